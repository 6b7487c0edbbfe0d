"""What the demo, the benchmarks and the tests share: processes, a client, conversations, tiny models."""
