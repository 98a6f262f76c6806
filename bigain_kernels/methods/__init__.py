"""Methods: ops composed into a MergePlan, the configs that own them, and the schedules that drive them.

A method is a config class. To add one, here or in another package, derive it from `MergeConfig` or `PoolConfig`,
declare its options with `option`, and `register` it.
"""

from .abm import ABMConfig, abm_plan
from .avgpool import AvgPoolConfig
from .config import CompressionConfig, MergeConfig, PoolConfig
from .files import load_config, save_config
from .iekvd import IEKVDConfig
from .lgtm import LGTMConfig, lgtm_plan
from .mixed import MixedConfig
from .options import option
from .registry import config_class, names, register, unregister
from .schedule import alpha_schedule
from .sito import SiToConfig, sito_plan
from .todo import ToDoConfig
from .tome import ToMeConfig, tome_plan

for _config in (LGTMConfig, ABMConfig, ToMeConfig, SiToConfig, IEKVDConfig, ToDoConfig, AvgPoolConfig):
    register(_config)

__all__ = [
    "ABMConfig",
    "AvgPoolConfig",
    "CompressionConfig",
    "IEKVDConfig",
    "LGTMConfig",
    "MergeConfig",
    "MixedConfig",
    "PoolConfig",
    "SiToConfig",
    "ToDoConfig",
    "ToMeConfig",
    "abm_plan",
    "alpha_schedule",
    "config_class",
    "lgtm_plan",
    "load_config",
    "names",
    "option",
    "register",
    "save_config",
    "sito_plan",
    "tome_plan",
    "unregister",
]
