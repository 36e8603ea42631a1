"""The files of a run's corpora against the hashes of their manifests, divided over the ranks, beside the training."""

from __future__ import annotations

from dataclasses import dataclass, field

from dataflex_mega.config.checks import split_names
from dataflex_mega.data import manifest
from dataflex_mega.data.file_check import ExpectedFile, FileCheck
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.errors import DataError
from dataflex_mega.run.session import Session


@dataclass
class CorpusCheck:
    """Asks all ranks how far they are, and ends the run on all of them when one has found a wrong file."""

    collectives: TorchCollectives
    check: FileCheck
    is_over: bool = field(default=False, init=False)  # on all ranks

    def ask(self, wait: bool = False) -> None:
        """Every rank calls it; with `wait` it returns when all files were read. Raises DataError naming a wrong file."""
        if self.is_over:
            return
        if wait:
            self.check.wait()
        answers = self.collectives.all_gather_objects((self.check.is_finished, self.check.fault))
        faults = [fault for _, fault in answers if fault]
        if faults:
            raise DataError(
                f"corpus_dir: {faults[0]}; copy or prepare it again. Checkpoints before this may have used it"
            )
        self.is_over = all(finished for finished, _ in answers)


def start_check(session: Session) -> CorpusCheck | None:
    """Begin to read the files of the run's domains, largest first; None without a corpus or with `verify: sizes`."""
    keys = session.config.dataflex
    if keys.corpus_dir is None or keys.verify == "sizes":
        return None
    files = []
    for key, names_key in (("corpus_dir", "dataset"), ("eval_corpus_dir", "eval_dataset")):
        folder = getattr(keys, key)
        if folder is None:
            continue
        corpus = manifest.read(folder, key)
        for domain in corpus.pick(split_names(session.config.llamafactory.get(names_key)), names_key):
            prefix = corpus.prefix(domain)
            for suffix, sha256 in ((".bin", domain.bin_sha256), (".idx", domain.idx_sha256)):
                files.append(
                    ExpectedFile(prefix.with_name(prefix.name + suffix), sha256, corpus.folder / manifest.NAME)
                )
    files.sort(key=lambda file: (-file.path.stat().st_size, file.path))
    info = session.parallel_info
    return CorpusCheck(session.collectives, FileCheck(files[info.rank :: info.world_size]))
