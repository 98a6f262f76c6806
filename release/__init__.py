"""What is released: wheels and the source distribution (`wheels`), and the kernel for the hub (`hub`)."""
