"""The benchmark engine: correctness first, then interleaved times as ratios inside one run."""
