"""What the scripts share. Importing it limits how long OpenMP's idle threads spin.

libgomp's threads spin while they wait for work. Two programs on the same cores then wait for each other's idle threads.
libgomp reads the environment when it is loaded, with torch, so a script imports this package first. What the user has
set is kept.
"""

import os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
