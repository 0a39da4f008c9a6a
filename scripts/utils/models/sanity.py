"""What a parent model's folder must hold before anything is made of it: as many layers as it says, and
numbers.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils.errors import UserError
from utils.models.four_bit import layers_of, stored_weight
from utils.models.parents import Parent
from utils.zero import gathered

MOST_LAYERS = 10_000  # where the number of weights is not known; the deepest model we know of has 1000


def refuse_layers(parent: Parent) -> None:
    """Raise UserError when config.json names more layers than there are weights: building them would take
    hours, and the weights would be missing in the end.
    """
    layers = getattr(parent.config.get_text_config(), "num_hidden_layers", None)
    weights = _weights_in(parent)
    if isinstance(layers, int) and layers > (weights or MOST_LAYERS):
        why = f"its files hold {weights} weights" if weights else f"{MOST_LAYERS} is the limit"
        raise UserError(f"{parent.key}: config.json of '{parent.name}' says {layers} layers, but {why}")


def _weights_in(parent: Parent) -> int:
    """How many weights the safetensors files of a folder hold; 0 when there are none, or it is on the hub."""
    try:
        return sum(len(_names(path)) for path in _files(parent))
    except (SafetensorError, OSError):
        return 0  # `from_pretrained` says what is wrong


def _files(parent: Parent) -> list[Path]:
    """The safetensors files of a folder; none of a model on the hub."""
    return sorted(parent.folder.glob("*.safetensors")) if parent.folder is not None else []


def _names(path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def refuse_not_finite(model, parent: Parent) -> None:
    """Raise UserError for a weight that is NaN or infinite: every score and loss would be. All ranks must
    call it.
    """
    for name, weight in model.named_parameters():
        with gathered([weight]):
            if not weight.isfinite().all():
                raise _not_finite(name, parent)
    if layers := layers_of(model):
        # a GPU turns NaN into one of the 16 numbers as it rounds, so the files are looked at
        for path in _files(parent):
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    if not file.get_tensor(name).isfinite().all():
                        raise _not_finite(name, parent)
        for name, layer in layers:
            if not stored_weight(layer).isfinite().all():
                raise _not_finite(f"{name}.weight", parent)


def _not_finite(name: str, parent: Parent) -> UserError:
    return UserError(f"{parent.key}: '{parent.name}' has weights that are no finite numbers (NaN or "
                     f"infinite), in {name}; take another checkpoint of it")
