"""HTML pages that need no other file: the templates, the charts and what launcher and jobs both show on them.

Imported by `launcher` (compare) and by `jobs` (report, preview, generations). May import `conf` and jinja2.
"""
