"""What the plugins for inference engines share, none of which needs an engine: options, plans and batches."""
