"""What people look at.

`draw` turns tables and patterns into pictures; `run` runs notebooks and keeps their records; `study` computes the
tables of notebooks; `explore` has the widgets; the command line is `cli`, on top.  A group imports only from those
named before it.
"""
