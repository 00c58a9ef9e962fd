"""Matrix products in fp32 on the tensor cores: see :mod:`vimfast_kernels.product.launch`."""
