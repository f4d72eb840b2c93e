"""Pure torch: blocks, nearest codes, quantizers. Knows no model, no data, no files."""
