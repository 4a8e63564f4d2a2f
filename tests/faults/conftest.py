"""What these tests start as programs is no test, and finds its neighbours only there."""

collect_ignore = ["count.py", "kills.py", "sitecustomize.py"]
