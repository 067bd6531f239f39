"""Fetches a named checkpoint from the Hugging Face Hub or from Kaggle into the library's cache."""

import pathlib

from gemma_lora.errors import UserError, extra

# Weights, config and tokenizer in the forms that this package reads; nothing else is fetched.
HF_FILES = ("*.safetensors", "*.json", "tokenizer.*", "*.jinja", "*.model", "merges.txt")


def hugging_face(name: str) -> pathlib.Path:
    """'ORG/NAME' or 'ORG/NAME@revision' -> the local snapshot's directory.

    Raises UserError, with the next step, for a model that is gated, absent or out of reach.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = name.partition("@")
    page = f"https://huggingface.co/{repo}"
    try:
        found = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(HF_FILES)
        )
    except errors.GatedRepoError:  # before its base class, RepositoryNotFoundError
        raise UserError(
            f"hf:{name} is gated: accept the licence at {page}, then run: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"hf:{name}: there is no public model {page}; check the name, or, for a private model, "
            "run: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"hf:{name}: {page} has no revision {revision!r}") from None
    except errors.HFValidationError:
        raise UserError(f"hf:{name}: expected hf:ORG/NAME or hf:ORG/NAME@revision") from None
    # No network, offline mode without a cached copy, a full disk; a connection lost on the way.
    except (OSError, errors.HTTPError) as e:
        raise UserError(
            f"hf:{name} could not be fetched ({_line(e)}); download {page} by other means and give "
            "its directory as weights"
        ) from None
    return pathlib.Path(found)


def kaggle(name: str, asked: str = "") -> pathlib.Path:
    """'OWNER/MODEL/FRAMEWORK/VARIATION' (and '/VERSION') -> the local copy's directory.

    asked: what the user wrote, where that is something else.

    Raises UserError, with the next step, for a model that needs consent, is absent or out of reach.
    """
    try:
        import kagglehub
    except ImportError:
        raise UserError(
            f"weights from Kaggle need the kagglehub package; run: {extra('kaggle')}"
        ) from None
    asked = asked or f"kaggle:{name}"
    if len(name.split("/")) not in (4, 5):
        raise UserError(
            f"{asked}: expected kaggle:OWNER/MODEL/flax/VARIATION, such as "
            "kaggle:google/gemma/flax/2b"
        )
    page = f"https://www.kaggle.com/models/{'/'.join(name.split('/')[:2])}"
    other = f"or download {page} by other means and give its directory as weights"
    try:
        return pathlib.Path(kagglehub.model_download(name))
    except Exception as e:  # kagglehub's own errors and those of requests have no common base
        status = getattr(getattr(e, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"{asked}: no permission; accept the licence at {page} and give Kaggle's "
                f"credentials in KAGGLE_API_TOKEN or ~/.kaggle/kaggle.json, {other}"
            ) from None
        if status == 404:
            raise UserError(f"{asked}: there is no such model; look at {page}") from None
        raise UserError(f"{asked} could not be fetched ({_line(e)}); try again, {other}") from None


def _line(e: Exception) -> str:
    """The first line of the error's text, or its name."""
    return next(iter(str(e).splitlines()), "") or type(e).__name__
