"""Ready-made tasks, one a file; each function returns a :class:`~lilliput.core.task.Task`.

They are found by name through :mod:`lilliput.core.registry`, which reads these files' source text.
"""
