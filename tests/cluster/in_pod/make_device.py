"""In a pod: make device files of two IOMMU groups, the pod's own and another's, and open them.

make_device.py GROUP=MINOR GROUP=MINOR     the pod's own first; prints for each its path, and the errno of opening it
"""

import os
import stat
import sys

own = sys.argv[1].partition("=")[0]
major = os.major(os.stat(f"/dev/vfio/{own}").st_rdev)
for argument in sys.argv[1:]:
    group, _, minor = argument.partition("=")
    path = f"/tmp/{group}"
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(major, int(minor)))
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as error:
        print(path, error.errno)
    else:
        print(path, 0)
