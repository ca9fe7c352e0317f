"""DeepSpeed's ZeRO: optimizer states, gradients and parameters shared by the data ranks. Imported when it is used."""

from faccel.backends.deepspeed.engine import DEEPSPEED as DEEPSPEED
from faccel.backends.deepspeed.installed import HOW as HOW
from faccel.backends.deepspeed.installed import WANTED as WANTED
from faccel.backends.deepspeed.installed import probe as probe
from faccel.backends.deepspeed.installed import refuse as refuse
