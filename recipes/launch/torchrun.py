"""torchrun, with statuses by which a scheduler can tell what to start again: torchrun itself says 1 for all of it.

143: the processes have saved their place, because another node was told to stop. 255: the first node is gone, where all
nodes meet, and torchrun cannot start again without it; ssh says 255 for a lost connection, too.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main

SAVED = (75, 143)  # of a process of the run: docs/stopping.md

try:
    main()
except RendezvousError as error:
    said = str(error) or type(error).__name__
    print(f"error: this node has lost the first one ({said}); start it again", file=sys.stderr)
    sys.exit(255)
except ChildFailedError as error:
    if error.get_first_failure()[1].exitcode in SAVED:
        sys.exit(143)
    raise
