"""Every error offramp raises on purpose. A message says what was received, what was expected and what to do."""

from __future__ import annotations


class OfframpError(Exception):
    """Root of all errors of this package: catch this one to catch them all."""


class SplitError(OfframpError):
    """The backbone cannot be cut into stages that provably give its own answers."""


class InputError(OfframpError, ValueError):
    """An argument, or one batch of inputs, is not what the call expects."""


class StreamError(OfframpError):
    """The stream of inputs is empty, too short, malformed, or broke while it was read.

    `recorded` holds what was recorded until then, if anything: `fit` accepts it in place of a stream.
    """

    recorded: object = None


class StorageError(OfframpError, OSError):
    """What was to be recorded or saved could not be written (a full disk, a folder without permission).

    `recorded` holds what was recorded until then, if anything: `fit` accepts it in place of a stream.
    """

    recorded: object = None


class ArtifactError(OfframpError):
    """A saved artefact is damaged, of another format, or belongs to another backbone."""


class MissingExtraError(OfframpError, ImportError):
    """An optional dependency is needed here and not installed; the message names the extra to install."""


class BackendError(OfframpError):
    """A part cannot be built for another runtime here; the message says what was tried and what the runtime said."""
