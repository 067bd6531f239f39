"""Sources of rows, templates, packing, batches."""
