"""What benchmarks/gpu.sh runs on a machine with an NVIDIA card: stages by their worth, resumable, within a budget."""
