"""Says what the HTML pages of a run show: its data, its training and its answers. The templates are in `pages`.

May import `conf`, `pages`, and the folders of jobs up to `jobs.training` in the order of tests/test_layers.py.
"""
