"""SaveDirectory: the saves of one run.

    save-0000000007.safetensors     save 7: what was new since save 6, the small state, and which other files it needs
    save-0000000006.safetensors     save 6, or what save 7 needs of it
    save-0000000007-1.episodes/     links to the files of the episodes that were new in store 1, a dataset of files
    .tmp-save-0000000008...         is being written
    .lock                           names the process that saves

A save is there once its file has got its name, which comes last: all that it needs is on the disk by then. Only after
that, what no save needs any more is removed. Killed, or out of space, anywhere before: the save before stands.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from buffers.disk import TEMPORARY, Descriptor, Directory, open_directory
from buffers.disk.lock import take_lock
from buffers.saving.packed_file import DamagedSaveError
from buffers.saving.places import Places, ids_in
from buffers.saving.saved import SaidOfSave, Save, file_name, folders_of_links, save_numbers
from buffers.saving.snapshot import Snapshot
from buffers.utils import ThreadLock, integer, progress_bar

__all__ = ["SaveDirectory"]


class SaveDirectory:
    """Where a run saves, and what it has saved there.

    Args:
        path: Of the directory, which the first save makes.
        save: The save of this directory from which the run goes on.
        is_same: Whether what was loaded from it is the same by now. If not, all is saved anew.
    """

    def __init__(self, path: str, save: Save | None = None, is_same: bool = True) -> None:
        self.path = path
        self._run = secrets.token_hex(8) if save is None else save.run
        # Of the last save: where the episodes of each store are, and all files that it needs, with what they say.
        self._places: list[Places] = [] if save is None else save.places
        self._stamps: dict[int, str] = {} if save is None else save.stamps
        self._folders: set[str] = set() if save is None else set(save.folders)
        # The newest save that is known to be of this run, or was passed over.
        self._newest = -1 if save is None else save.newest
        if not is_same:
            self._places, self._stamps, self._folders = [], {}, set()
        # Of the file of the last save, see `_identity`.
        self._seen: tuple[int, ...] | None = None
        self._lock = ThreadLock()
        self._last: Future[str] | None = None

    def save(self, begin: Callable[[Snapshot], None], keep: int, block: bool, progress: bool) -> Future[str]:
        """Save what `begin` puts into a snapshot; the path of the file, once it is there."""
        keep = integer("keep", keep, 1)
        with self._lock:
            if self._last is not None:
                self._last.exception()  # Waits until it is written, or has failed.
            future: Future[str] = Future()
            future.set_running_or_notify_cancel()  # Nobody can cancel it.
            with contextlib.ExitStack() as stack:
                try:
                    snapshot = self._begin(stack, begin, keep, progress)
                except OSError as error:
                    raise self._explained(error) from error
                self._last, left = future, stack.pop_all()
            if block:
                self._finish(left, snapshot, future)
                future.result()
                return future
            thread = threading.Thread(target=self._finish, args=(left, snapshot, future, True), name="buffers-save")
            try:
                thread.start()
            except RuntimeError:  # There are too many threads.
                self._finish(left, snapshot, future)
            return future

    def _begin(
        self, stack: contextlib.ExitStack, begin: Callable[[Snapshot], None], keep: int, progress: bool
    ) -> Snapshot:
        """Do all that belongs to the moment of the call."""
        descriptor = stack.enter_context(contextlib.closing(Descriptor(open_directory(self.path, True))))
        directory = Directory(self.path, descriptor, durable=True)
        stack.enter_context(contextlib.closing(take_lock(self.path, descriptor.number)))
        names = directory.names()
        self._check(directory, names)
        for name in names:
            if name.startswith(f"{TEMPORARY}save-"):
                directory.remove(name)
        taken = [-1, *save_numbers(names), *folders_of_links(names).values()]
        sizes = {number: directory.status(file_name(number)).st_size for number in self._stamps}
        snapshot = Snapshot(max(taken) + 1, directory, self._places, sizes)

        def settle(error: object, *_: object) -> None:
            if error is None:
                self._settle(snapshot, keep)
            else:
                with contextlib.suppress(OSError):
                    _remove_folders(directory, snapshot.number)

        # Before its file can appear, as Ctrl-C may come right behind that.
        self._newest = snapshot.number
        stack.callback(snapshot.end)
        stack.push(settle)
        file = stack.enter_context(directory.new_file(file_name(snapshot.number)))
        stack.callback(snapshot.stop)
        snapshot.said |= {"run": self._run, "number": snapshot.number, "stamp": secrets.token_hex(8)}
        begin(snapshot)
        snapshot.said["files"] = {str(number): self._stamps[number] for number in snapshot.needs}
        snapshot.prepare(file)
        snapshot.on_progress = stack.enter_context(progress_bar(progress, snapshot.num_bytes, "saving")).update
        return snapshot

    def _check(self, directory: Directory, names: list[str]) -> None:
        """RuntimeError if another run saves here. Where files are gone, everything is saved anew."""
        numbers = save_numbers(names)
        is_ours = not numbers or numbers[-1] <= self._newest
        if numbers and is_ours and _identity(directory, numbers[-1]) != self._seen:
            with contextlib.suppress(DamagedSaveError):
                newest = Save(directory, numbers[-1], numbers[-1])
                is_ours = newest.run == self._run and self._stamps.get(newest.number) in (None, newest.stamp)
        if not is_ours:
            raise RuntimeError(
                f"{self.path} holds saves of another run, the newest has the number {numbers[-1]}. Load it, to go on "
                "with that run, or choose another directory."
            )
        if not ({*self._stamps} <= {*numbers} and self._folders <= {*names}):
            self._places, self._stamps, self._folders = [], {}, set()

    def _finish(
        self, stack: contextlib.ExitStack, snapshot: Snapshot, future: Future[str], warns: bool = False
    ) -> None:
        """Write what is left, and let the file appear."""
        try:
            with stack:
                snapshot.write()
        except BaseException as error:
            found = self._explained(error) if isinstance(error, OSError) else error
            future.set_exception(found)
            if not isinstance(error, Exception):
                raise
            if warns:
                warnings.warn(f"A save failed: {found}", stacklevel=2)
        else:
            future.set_result(f"{self.path}/{file_name(snapshot.number)}")

    def _explained(self, error: OSError) -> OSError:
        what = f"A save could not be written, those before it are kept: {error.strerror or error}"
        return OSError(error.errno, f"{what}. Make room or permission, and save again", self.path)

    def _settle(self, snapshot: Snapshot, keep: int) -> None:
        """Take note of a save that is there, and remove what none of the `keep` newest that are whole needs.

        What cannot be removed now is removed by a later save.
        """
        told = SaidOfSave(snapshot.number, snapshot.said)
        self._places, self._stamps, self._folders = told.places, told.stamps, {*told.folders}
        with contextlib.suppress(OSError):
            self._seen = _identity(snapshot.directory, snapshot.number)
            names, kept = snapshot.directory.names(), [told]
            numbers = save_numbers(names)
            for number in reversed(numbers[:-1]):
                if len(kept) == keep:
                    break
                with contextlib.suppress(DamagedSaveError):
                    save = Save(snapshot.directory, number, snapshot.number)
                    if {*save.stamps} <= {*numbers} and {*save.folders} <= {*names}:
                        kept.append(save)
            _clean(snapshot.directory, names, kept)


def _identity(directory: Directory, number: int) -> tuple[int, ...]:
    """What changes if somebody else writes the file of a save."""
    status = directory.status(file_name(number))
    return status.st_ino, status.st_size, status.st_mtime_ns


def _remove_folders(directory: Directory, number: int) -> None:
    """Remove the links of a save that has failed, unless its file has appeared before that."""
    names = directory.names()
    for name, its_number in folders_of_links(names).items():
        if its_number == number and file_name(number) not in names:
            directory.remove_folder(name)


def _clean(directory: Directory, names: list[str], kept: Sequence[SaidOfSave]) -> None:
    needed = {file_name(number) for save in kept for number in save.stamps}
    # By folder of links, its store and the runs of ids that live in one of the saves.
    folders: dict[str, list[np.ndarray]] = {}
    for save in kept:
        for folder, store in save.folders.items():
            folders.setdefault(folder, []).append(save.live(store))
    for name in {*map(file_name, save_numbers(names))} - needed:
        directory.remove(name)
    for name in folders_of_links(names).keys() - folders.keys():
        directory.remove_folder(name)
    for name, runs in folders.items():
        links = directory.folder(name)
        if links is not None:
            _unlink_dead(links, runs)
            links.close()


def _unlink_dead(folder: Directory, runs: list[np.ndarray]) -> None:
    names = [name for name in folder.names() if name[:1].isdigit()]
    ids = np.array([int(name.partition("-")[0]) for name in names], np.int64)
    is_live = np.zeros(len(ids), np.bool_)
    for live in runs:
        is_live |= ids_in(live, ids)
    for number in (~is_live).nonzero()[0].tolist():
        folder.remove(names[number])
