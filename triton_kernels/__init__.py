"""Triton kernels of bigain_kernels: one file per op, each with its kernels and a `launch_<op>` function."""
