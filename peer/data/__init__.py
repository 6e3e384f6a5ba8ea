"""From text to token windows: corpus, tokenizer, memory-mapped shards and the stateless sampler."""
