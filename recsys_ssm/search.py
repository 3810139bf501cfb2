"""Search hyper-parameters: ``python -m recsys_ssm.search dataset=spotify backbone=mamba search.n_trials=20``.

Each trial is a job as those of a sweep: a training in a process and a folder of its own, found again by its options.
The study is a SQLite file in the search's folder. The same command again resumes the search.
"""

from __future__ import annotations

from recsys_ssm.cli import threads  # noqa: F401 - before PyTorch loads OpenMP

# isort: split
import contextlib
import importlib
import logging
import math
import signal
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from recsys_ssm.cli.command import command
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import instantiate, plain
from recsys_ssm.sweeps.identity import (
    job_folder,
    job_hash,
    job_options,
    short_name,
    sweep_command,
    sweep_name,
    threads_for,
)
from recsys_ssm.sweeps.jobs import (
    Stop,
    config_arguments,
    hydra_overrides,
    lock_folder,
    run_in_folder,
    this_process,
)
from recsys_ssm.sweeps.progress import ProgressLine, Summary, error_line, print_table, summarize
from recsys_ssm.sweeps.space import distribution, flatten_space, spell
from recsys_ssm.sweeps.status import job_state, validations

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

STUDY = "study.db"
_SHOWN = 10
_SPACE = "search.space."
_OPEN = (_SPACE, "search.sampler", "search.pruner")


def search(cfg: DictConfig) -> dict[str, Any]:
    """Run trials until ``search.n_trials`` of them are complete, and print the best.

    Raises:
        UserError: An option is wrong, or no trial is complete.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    running = Search(cfg)
    with lock_folder(running.folder) as lock:
        if lock is None:
            raise UserError(
                f"{running.shown}: another search runs here; wait for its end, or give another name with sweep="
            )
        running.open_study()
        try:
            running.run()
        except KeyboardInterrupt:
            sys.exit("stopped; the same command resumes the search")
        return running.report()


class NoValueError(Exception):
    """The job of a trial failed or was interrupted; its folder has the reason."""


class Search:
    """A search in its folder: the options that are fixed, those that are searched, and the study.

    Args:
        cfg: The config of ``conf/search.yaml``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        hydra_cfg = HydraConfig.get()
        plugin = str(hydra_cfg.launcher.get("_target_")).rpartition(".")[2]
        if plugin not in ("BasicLauncher", "JoblibLauncher"):
            launcher = hydra_cfg.runtime.choices.get("launcher", plugin)
            raise UserError(
                f"launcher={launcher}: a search runs its trials on this machine; choose basic or joblib"
            )
        if cfg.test is not None:
            raise UserError(
                f"test={cfg.test}: a search looks at validation alone; leave test= to the command it ends with"
            )
        self.n_trials = cfg.search.n_trials
        if not isinstance(self.n_trials, int) or self.n_trials < 1:
            raise UserError(f"search.n_trials={self.n_trials}: expected a whole number above 0")
        self.cfg = cfg
        self.folder = Path(hydra_cfg.runtime.output_dir)
        self.shown = _from_here(self.folder)
        self.monitor, self.mode = str(cfg.monitor), str(cfg.monitor_mode)
        # Without the `++` by which a command lets any argument of a class be given.
        self.given = [each.removeprefix("++") for each in hydra_cfg.overrides.task]
        self.fixed = [each for each in self.given if not _key(each).startswith("search")]
        self.space = searched_options(plain(cfg.search.space), self.given)
        self.distributions = {
            option: distribution(option, node) for option, node in self.space.items()
        }
        self.arguments = [*config_arguments(), *hydra_overrides()]
        self.processes = int(cfg.launcher.processes)
        self.threads = min(int(cfg.launcher.threads), threads_for(self.processes))
        self._stop = threading.Event()
        self._hashes: set[str] = set()
        self.since = time.time()
        self.study: Study

    def open_study(self) -> None:
        """Create the study or open an earlier one, whose trials that were cut short are queued again.

        Only one process has the folder's lock, so a trial that is ``RUNNING`` here was cut short.

        Raises:
            UserError: The folder holds a search of other options, or a file that cannot be read.
        """
        import optuna

        path = self.folder / STUDY

        def connect() -> sqlite3.Connection:
            return sqlite3.connect(path, timeout=60, check_same_thread=False)

        try:
            with contextlib.closing(connect()) as database:
                database.execute("PRAGMA schema_version")
        except sqlite3.Error as error:
            raise UserError(
                f"{self.shown / STUDY}: cannot be read as a study ({error}); remove it to begin anew"
            ) from error
        self.study = optuna.create_study(
            storage=optuna.storages.RDBStorage(
                "sqlite:///study.db",  # the path itself may have characters that are special in a URL
                engine_kwargs={"creator": connect},
            ),
            study_name="search",
            direction="minimize" if self.mode == "min" else "maximize",
            load_if_exists=True,
        )
        self._check_same_search()
        states = optuna.trial.TrialState
        for trial in self.study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            if trial.params:
                self._retry(trial.number, trial.params)
            self.study.tell(trial.number, state=states.FAIL)
        trials = self.study.get_trials(deepcopy=False)
        self._hashes.update(
            job_hash(self.overrides(trial.params))
            for trial in trials
            if trial.params.keys() == self.space.keys()
        )
        # The same seed would draw the earlier trials again.
        seed = int(self.cfg.search.seed) + len(trials)
        self.study.sampler = instantiate(self._part("sampler"), "search.sampler", seed=seed)
        pruner = instantiate(self._part("pruner"), "search.pruner")
        self.study.pruner = pruner or optuna.pruners.NopPruner()

    def _check_same_search(self) -> None:
        fixed = job_options(each for each in self.fixed if _key(each) != "test")
        now = {**fixed, "monitor": self.monitor, "monitor_mode": self.mode}
        now |= {f"{_SPACE}{option}": spell(node) for option, node in self.space.items()}
        before = self.study.user_attrs.get("options")
        if before is None:
            self.study.set_user_attr("options", now)
        elif before != now:
            keys = sorted(key for key in before | now if before.get(key) != now.get(key))
            changed = ", ".join(
                f"{key} {before.get(key, 'not given')} then, {now.get(key, 'not given')} now"
                for key in keys
            )
            raise UserError(
                f"{self.shown}: a search with other options ({changed}); give another name with sweep="
            )

    def _part(self, name: str) -> Any:
        """Return ``search.sampler`` or ``search.pruner``; a mapping on the command line replaces the file's."""
        for each in OverridesParser.create().parse_overrides(self.given):
            value = each.value()
            if each.key_or_group == f"search.{name}" and isinstance(value, dict):
                return value
        return plain(self.cfg.search[name])

    def overrides(self, params: dict[str, Any]) -> list[str]:
        """Return the overrides of the trial with these values."""
        return [*self.fixed, *_assignments(params), "test=null"]

    def run(self) -> None:
        """Run the trials that are missing, ``launcher.processes`` at once."""
        missing = self.n_trials - len(self._done())
        line = ProgressLine(self._summary, self._spell, every_s=1.0)
        try:
            with self._ctrl_c():
                if missing > 0:
                    self.study.optimize(
                        self._value,
                        n_trials=missing,
                        n_jobs=self.processes,
                        catch=(NoValueError,),
                    )
        finally:
            line.stop()

    @contextlib.contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        """Let Ctrl-C stop the trials that other threads run, too."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop.set()
            raise KeyboardInterrupt

        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_default:
            signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            if is_default:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def _value(self, trial: Trial) -> float:
        """Run a trial's job and return its value.

        Raises:
            TrialPruned: Its validations are worse than other trials'.
            NoValueError: The job failed or was interrupted.
        """
        import optuna

        params = {
            option: _suggest(trial, option, each) for option, each in self.distributions.items()
        }
        overrides = self.overrides(params)
        folder = self.folder / job_folder(_readable(params), overrides)
        self._hashes.add(folder.name[-8:])
        trial.set_user_attr("folder", folder.name)
        seen = 0

        def poll() -> Stop | None:
            nonlocal seen
            if self._stop.is_set():
                return "interrupted"
            values = validations(folder, self.monitor)
            for n, value in enumerate(values[seen:], seen + 1):
                trial.report(value, n)
            is_new, seen = len(values) > seen, max(seen, len(values))
            return "pruned" if is_new and trial.should_prune() else None

        try:
            value = run_in_folder(
                folder,
                [*self.arguments, *overrides],
                command="train",
                overrides=overrides,
                threads=self.threads,
                monitor=self.monitor,
                mode=self.mode,
                sweep=this_process(),
                poll=poll,
                lock_wait_s=math.inf,  # another trial with the same values may run
            )
        except KeyboardInterrupt:
            self._retry(trial.number, params)
            raise
        if value is not None and math.isfinite(value):
            return value
        state = job_state(folder)
        if state == "pruned":
            raise optuna.TrialPruned
        if state == "interrupted":
            self._retry(trial.number, params)
        raise NoValueError

    def _retry(self, number: int, params: dict[str, Any]) -> None:
        """Queue the values of a trial that was cut short: its job goes on from its checkpoint."""
        self.study.enqueue_trial(params, user_attrs={"retry_of": number})

    def _done(self) -> list[FrozenTrial]:
        import optuna

        states = optuna.trial.TrialState
        return self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))

    def _summary(self) -> Summary:
        return summarize(self.folder, self._hashes, self.n_trials, self.mode, self.since)

    def _spell(self, summary: Summary) -> str:
        return summary.line(self.folder.name, self.monitor, kind="search")

    def report(self) -> dict[str, Any]:
        """Print failures, the best trials and the commands that come next; return the best trial.

        Raises:
            UserError: No trial is complete.
        """
        import optuna

        states = optuna.trial.TrialState
        trials = self.study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get("retry_of") for trial in trials}
        by_state = {
            state: [t for t in trials if t.state == state and t.number not in retried]
            for state in (states.COMPLETE, states.PRUNED, states.FAIL)
        }
        for message, failed in self._failures().items():
            print(f"error ({failed}): {message}", file=sys.stderr)
        complete = sorted(
            by_state[states.COMPLETE], key=lambda t: t.value or 0.0, reverse=self.mode != "min"
        )
        if not complete:
            advice = (
                "correct what failed"
                if by_state[states.FAIL]
                else "all were pruned: raise search.n_trials or set search.pruner=null"
            )
            raise UserError(f"no trial of {self.shown} is complete; {advice}")
        options = list(self.space)
        print_table(
            f"{self.monitor} of the best trials",
            ["trial", self.monitor, *options],
            [
                [
                    str(trial.number),
                    f"{trial.value:.4f}",
                    *(_short(trial.params[o]) for o in options),
                ]
                for trial in complete[:_SHOWN]
            ],
        )
        counts = ", ".join(
            f"{len(by_state[state])} {word}"
            for state, word in (
                (states.COMPLETE, "complete"),
                (states.PRUNED, "pruned"),
                (states.FAIL, "failed"),
            )
        )
        best = complete[0]
        line, runs = self._best_command(best.params)
        log.info("study   %s (%s; a SQLite file for optuna-dashboard)", self.shown / STUDY, counts)
        log.info("next    %s", line)
        log.info("then    python -m recsys_ssm.report %s", runs)
        return {"value": best.value, "options": dict(best.params), "command": line}

    def _failures(self) -> dict[str, str]:
        """Return each error of this command's trials, with the first trial that had it."""
        found: dict[str, list[Path]] = {}
        for job in self._summary().failed:
            found.setdefault(error_line(job), []).append(job)
        return {
            message: f"{len(jobs)} trial{'s' if len(jobs) > 1 else ''}, {_from_here(jobs[0])}"
            for message, jobs in found.items()
        }

    def _best_command(self, params: dict[str, Any]) -> tuple[str, Path]:
        """Return the command that trains and tests the best options with five seeds, and the folder it writes."""
        own = ("ckpt_path", "seed", "sweep", "test")
        kept = [each for each in self.fixed if _key(each) not in own]
        overrides = [*kept, *_assignments(params), "seed=range(5)"]
        folder = Path(str(self.cfg.output_root)) / "multirun" / sweep_name(overrides)
        return sweep_command([*config_arguments(), *overrides]), folder


def searched_options(space: dict[str, Any] | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the options to search, each with its range or choices.

    Args:
        space: ``search.space`` of the composed config. Hydra merges a mapping on the command line into one in a file.
        overrides: Those of the command line: ``search.space.<option>=…`` replaces the option's range or choices, and
            ``<option>=…`` fixes the option.

    Raises:
        UserError: Nothing is left to search, or an option is both fixed and searched on the command line.
    """
    found = flatten_space(space or {})
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    keys = {each.key_or_group.replace("/", "."): each for each in parsed}
    for key, each in keys.items():
        option = key.removeprefix(_SPACE)
        if key.startswith(_SPACE) and isinstance(each.value(), dict | list):
            inner = flatten_space({option: each.value()})
            found = {o: v for o, v in found.items() if not f"{o}.".startswith(f"{option}.")} | inner
    for option in list(found):
        if option in keys:
            if f"{_SPACE}{option}" in keys:
                raise UserError(
                    f"{option}: both fixed ({keys[option].input_line}) and searched; leave one of them out"
                )
            del found[option]
    if not found:
        raise UserError(
            "search.space: nothing to search; give 'search.space.optimizer.lr={low: 1e-5, high: 1e-3, log: true}'"
        )
    return found


def _suggest(trial: Trial, option: str, among: BaseDistribution) -> Any:
    """Return the value that the study's sampler draws for an option."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(among, CategoricalDistribution):
        return trial.suggest_categorical(option, among.choices)
    if isinstance(among, IntDistribution):
        return trial.suggest_int(option, among.low, among.high, step=among.step, log=among.log)
    assert isinstance(among, FloatDistribution)
    return trial.suggest_float(option, among.low, among.high, step=among.step, log=among.log)


def _assignments(params: dict[str, Any]) -> list[str]:
    # Choices are kept as they are spelled; numbers are numbers.
    return [f"{option}={value}" for option, value in params.items()]


def _readable(params: dict[str, Any]) -> str:
    words = (f"{option.rpartition('.')[2]}-{_short(value)}" for option, value in params.items())
    return short_name("_".join(words)) or "trial"


def _from_here(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0].partition(".")[0]


def prepare(arguments: Sequence[str]) -> list[str]:
    """Return the command line with options to search marked as new, and with a name for the search.

    Raises:
        UserError: The command line asks for a sweep of searches, or Optuna is not installed.
    """
    try:
        importlib.import_module("optuna")
    except ImportError as error:
        raise UserError(
            'a search needs Optuna, which is not installed; pip install "recsys-ssm[optuna]"'
        ) from error
    if not {"--multirun", "-m"}.isdisjoint(arguments):
        raise UserError("--multirun: a search runs many trials by itself; leave it out")
    # Hydra refuses an option that no file names; `++` adds it.
    prepared = [f"++{each}" if each.startswith(_OPEN) else each for each in arguments]
    if not any(each.startswith("sweep=") for each in arguments):
        prepared.append(f"sweep={sweep_name(_of_name(each) for each in arguments)}")
    return prepared


def _of_name(argument: str) -> str:
    """Return an override as part of a search's name: unlike a sweep's, this has the seed and the space in it."""
    bare = argument.lstrip("+")
    return f"run.{bare}" if bare.startswith("seed=") else bare.replace(_SPACE, "space.", 1)


_main = command("search")(search)


def main() -> None:
    try:
        sys.argv[1:] = prepare(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    _main()


if __name__ == "__main__":
    main()
