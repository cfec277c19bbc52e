"""Weights run under the network that they were trained as, or under another one on request."""

from __future__ import annotations

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_ext.checkpoint import CheckpointError
from mmdet_ext.config.network import (
    TRAINED_AS,
    Difference,
    differences,
    need_num_slices,
    network_of,
    of_parts,
    of_training,
)

ANOTHER_NETWORK = (
    "{path} was trained as another network than the one of this config:\n{differences}\n{remedy}; "
    "--accept-differences runs it as the config says all the same."
)
OWN_CONFIG = "Give the config that it was trained with (docs/training.md)"
NO_RECORD = (
    "{path} does not say what network it was trained as (it is of another program or an earlier "
    "version): only names and shapes of its weights are compared with the config"
)


class TrainedAsHook(Hook):
    """Writes into checkpoints what network they are of, and compares before weights are loaded.

    Testing and resuming need the network that the weights were trained as, with its window, stack
    of slices and size of images. Weights that a new training starts from (`load_from`) need it as
    far as they go: of a backbone alone only that is compared (with the number of slices, if it is
    for one), and the number of classes and how the data is brought to the network are free, since
    training follows.

    Args:
        accept_differences: warn of them instead of raising CheckpointError.

    It is registered by `mmdet_ext.engine.run.build_runner`.
    """

    priority = "VERY_HIGH"  # before hooks that change what was loaded or is saved

    def __init__(self, accept_differences: bool = False) -> None:
        self.accept_differences = accept_differences

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint["meta"][TRAINED_AS] = [network_of(runner.cfg)]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Raises CheckpointError."""
        testing = runner._strict
        for warning in check_network(
            runner._load_from,
            checkpoint,
            runner.cfg,
            self.accept_differences,
            testing,
            start=not testing and not runner._resume,
        ):
            runner.logger.warning(warning)


def check_network(
    path: str,
    checkpoint: dict,
    config: Config,
    accept_differences: bool,
    testing: bool = True,
    start: bool = False,
) -> list[str]:
    """Compares what a checkpoint was trained as with a config; returns what to warn of.

    Args:
        path: of the checkpoint, for messages.
        testing: whether the weights are to be tested, or used, as they are: what only training
            sees may differ.
        start: whether a new training starts from them, see `TrainedAsHook`.

    Raises CheckpointError if they were trained as another network, unless `accept_differences`.
    """
    meta = checkpoint.get("meta")
    networks = meta.get(TRAINED_AS) if isinstance(meta, dict) else None
    if not networks:
        return [NO_RECORD.format(path=path)]
    now = network_of(config)
    # A converted checkpoint may be of several: the files do not tell AlignShift from TSM.
    found = min((differences(trained, now) for trained in networks), key=len)
    network = [d for d in found if not of_training(d)]
    if start:
        network = _that_weights_need(network, checkpoint["state_dict"], networks[0])
    if network and not accept_differences:
        text = "\n".join(f"  {difference}" for difference in network)
        raise CheckpointError(
            ANOTHER_NETWORK.format(path=path, differences=text, remedy=OWN_CONFIG)
        )
    return [f"{path}, {difference}" for difference in (network if testing else found)]


def _that_weights_need(
    found: list[Difference], state_dict: dict, trained: dict
) -> list[Difference]:
    """The differences that concern weights from which a new training starts."""
    parts = {name.removeprefix("module.").partition(".")[0] for name in state_dict}
    model = trained["model"]
    typed = {k for k, v in model.items() if isinstance(v, dict) and "type" in v}
    if typed - parts <= {"data_preprocessor"}:
        parts |= {"type", "num_slices"}
    elif need_num_slices(model, parts):
        parts |= {"num_slices"}
    return [d for d in found if of_parts(d, parts) and not d.path.endswith(".num_classes")]
