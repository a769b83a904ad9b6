"""How a batch becomes a parameter change. One file per rule; a new one is that file and one line here."""

from fastrl.updates.gxpo import GXPO
from fastrl.updates.sfpo import SFPO
from fastrl.updates.single import Single

UPDATES = {"single": Single, "sfpo": SFPO, "gxpo": GXPO}
