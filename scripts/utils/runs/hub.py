"""Upload of a finished model to the hub, private unless its repository is public already."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id

from utils.config import UserError

_FAILURES = (HfHubHTTPError, httpx.HTTPError, OSError, ValueError)


def refuse_closed_hub(name: str) -> None:
    """Raise UserError when the hub would not take the model at the end: a bad name, no token, no network."""
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise UserError(f"push_to_hub: '{name}' is no repository; give user/name")
        HfApi().whoami()
    except HFValidationError:
        raise UserError(f"push_to_hub: '{name}' is no repository; give user/name") from None
    except LocalTokenNotFoundError:
        raise UserError("push_to_hub: no token of the hub is here; run 'hf auth login', or set HF_TOKEN"
                        ) from None
    except _FAILURES as error:
        raise UserError(f"push_to_hub: the hub cannot be asked: {_reason(error)}") from None


def push(folder: Path, name: str, log) -> None:
    """Upload a folder. A failure is logged and loses nothing: the folder stays.

    Args:
        log: called with one line.
    """
    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        url = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload of final/")
    except _FAILURES as error:
        log(f"push_to_hub: '{name}' was not uploaded: {_reason(error)}; the model is in '{folder}', and "
            f"'hf upload {name} {folder}' tries again")
        return
    log(f"uploaded to {url}")


def _reason(error) -> str:
    """The first line of what went wrong; requests are named without their headers, so no token is in it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
