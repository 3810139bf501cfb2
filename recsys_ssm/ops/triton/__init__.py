"""Triton kernels of the operators, for GPUs without the public CUDA packages.

A module here registers the operators ``recsys_ssm::triton_…`` when it is imported, and needs the package ``triton``,
which PyTorch's CUDA builds bring. :mod:`recsys_ssm.ops._dispatch` imports a module when a call needs it. With
``TRITON_INTERPRET=1``, set before anything imports triton, the kernels also run on CPU tensors, slowly, for tests.
Sums have a fixed order: no kernel adds with atomics, so equal calls on one machine give equal bits.
"""
