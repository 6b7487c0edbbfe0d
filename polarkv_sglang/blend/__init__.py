"""CacheBlend: reuse of KV of text that is not a prefix, by computing part of it again (arXiv 2405.16444)."""
