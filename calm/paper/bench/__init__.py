"""What every experiment measures with: decoding, timing, grids, scores, cached results."""
