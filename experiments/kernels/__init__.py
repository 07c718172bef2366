"""What the scripts about kernels share: cases, ahead-of-time compiles, timing and pages."""
