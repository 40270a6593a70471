"""Networks, one a file; each function returns a fresh, randomly initialized ``nn.Module``.

They are found by name through :mod:`lilliput.core.registry`, which reads these files' source text.
"""
