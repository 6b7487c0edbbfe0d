"""What ``polarkv doctor`` looks at on this host and in the pool, one module per part."""
