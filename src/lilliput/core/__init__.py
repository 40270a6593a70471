"""The words of Lilliput: task, method, stage, recipe, run. No paper, no file, no command line.

The modules are imported one by one, because some of them (``registry``) must work without torch.
"""
