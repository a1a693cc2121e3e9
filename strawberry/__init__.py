"""The library that the scripts share. Importing it limits how long OpenMP's idle threads spin.

libgomp's threads spin while they wait for work, so two programs on the same cores wait for each other's idle threads.
libgomp reads the environment when it is loaded, with torch, so a script imports this package first. Values that the
user has set are kept.
"""

import os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
