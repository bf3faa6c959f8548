"""What knows nothing of models: text, files, progress, strict YAML, threads and processes."""
