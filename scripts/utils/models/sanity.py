"""What a parent model's folder must hold before anything is made of it: as many layers as it says, and
numbers.
"""

from safetensors import SafetensorError, safe_open

from utils.errors import UserError
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
    files = sorted(parent.folder.glob("*.safetensors")) if parent.folder is not None else []
    try:
        return sum(len(_names(path)) for path in files)
    except (SafetensorError, OSError):
        return 0  # `from_pretrained` says what is wrong


def _names(path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def refuse_not_finite(model, parent: Parent) -> None:
    """Raise UserError for a weight that is NaN or infinite: every score and loss would be. All ranks must
    call it.
    """
    for name, weight in model.named_parameters():
        with gathered([weight]):
            finite = bool(weight.isfinite().all())
        if not finite:
            raise UserError(f"{parent.key}: '{parent.name}' has weights that are no finite numbers (NaN or "
                            f"infinite), in {name}; take another checkpoint of it")
