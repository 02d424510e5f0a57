"""What the GPU kernels do on a GPU: built anywhere (build.py), measured in one run where there is one (run.py)."""
