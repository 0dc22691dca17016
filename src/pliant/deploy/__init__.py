"""Networks on their way to use: folded norms, fused blocks, exported files."""
