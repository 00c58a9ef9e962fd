"""What ``vimfast doctor`` looks at: the software, the machine, the data, and Vim-Tiny on each backend.

Whatever is missing, broken or stuck becomes a line: what might crash or hang is done in processes of its own.
"""

from vimfast.doctor.examination import examine
from vimfast.doctor.lines import Line, State

__all__ = ["Line", "State", "examine"]
