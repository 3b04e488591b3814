#!/usr/bin/env python3
"""Builds the project's trees, runs their tests and counts what happened. Started by tools/test.

For each tree (one meson build directory):
1. Configure it, or correct the options of one that is there.
2. Build: everything in the optimized tree, elsewhere only what the tree's suites run.
3. Run each suite with `meson test`. GTEST_OUTPUT makes each GoogleTest binary leave an XML report
   in a fresh directory.
4. Count: the cases of the XML reports; one for each test that left none; and one failure for each
   binary that failed although its report knows of no failure (a crash, a leak found at exit).
The skips with their reasons, the failures and the closing line come last.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import fnmatch
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

# Results of meson's testlog.json that are no failure. The others are FAIL, TIMEOUT, ERROR,
# INTERRUPT and UNEXPECTEDPASS.
GOOD_MESON_RESULTS = {"OK": PASSED, "EXPECTEDFAIL": PASSED, "SKIP": SKIPPED}

# A sanitizer tree is for finding faults, not for speed: -O1 compiles fast and keeps stacks honest,
# -g1 is enough for file and line. The engine's suite needs no appliance. GCC's flow warnings are
# unreliable in instrumented code, so warnings are errors in the optimized tree only.
SANITIZER_OPTIONS = {
    "werror": False,
    "debug": False,
    "optimization": "1",
    "cpp_args": ["-g1", "-fno-omit-frame-pointer"],
    "appliance": "disabled",
    "dpdk": "disabled",
    "gateway": "disabled",
    "peers": "disabled",
    "benchmarks": False,
}

SANITIZER_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1:print_summary=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    # A binary goes on after a race, so that its report names them all; it exits with 66.
    "TSAN_OPTIONS": "second_deadlock_stack=1:exitcode=66",
}

# The one line of a sanitizer's report that says what it is about.
SANITIZER_LINE = re.compile(r"^.*(SUMMARY: \w+Sanitizer|runtime error: ).*$", re.M)


@dataclasses.dataclass(frozen=True)
class Tree:
    """One build directory: what it is configured with and which suites run in it."""

    name: str
    suites: tuple
    options: dict
    compilers: dict = dataclasses.field(default_factory=dict)
    build_all: bool = False
    lint: bool = False
    # Sanitizers slow a test down, and a shared machine does too.
    timeout_multiplier: int = 2
    sanitized: bool = False


TREES = (
    Tree(
        name="release",
        suites=("tidy", "engine", "system"),
        # Otherwise meson.build's own defaults, so that a tree set up by hand is the same tree.
        options={"werror": True},
        build_all=True,
        lint=True,
    ),
    Tree(
        name="asan",
        suites=("engine",),
        options={"b_sanitize": "address,undefined", "b_lundef": False, **SANITIZER_OPTIONS},
        timeout_multiplier=6,
        sanitized=True,
    ),
    Tree(
        name="tsan",
        # Where one thread runs alone there is no race to be found.
        suites=("threads",),
        options={"b_sanitize": "thread", "b_lundef": False, **SANITIZER_OPTIONS},
        timeout_multiplier=10,
        sanitized=True,
    ),
    Tree(
        name="fuzz",
        suites=("fuzz",),
        # libFuzzer learns of new paths through instrumentation in the library code too.
        options={
            "fuzzers": True, "b_sanitize": "address,undefined", "b_lundef": False,
            **SANITIZER_OPTIONS,
            "cpp_args": SANITIZER_OPTIONS["cpp_args"] + ["-fsanitize=fuzzer-no-link"],
        },
        compilers={"CC": "clang-19", "CXX": "clang++-19"},
        timeout_multiplier=6,
        sanitized=True,
    ),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One counted test: a GoogleTest case, a test of another kind, or a step that failed."""

    tree: str
    name: str
    outcome: str
    reason: str = ""


class Console:
    """Prints to standard output and to the log of the whole run."""

    def __init__(self, log_path):
        self._log = open(log_path, "w", encoding="utf-8", errors="replace")

    def say(self, text=""):
        print(text, flush=True)
        self._log.write(text + "\n")
        self._log.flush()


def run_logged(command, log_path, echo=None, environment=None, cwd=None):
    """Runs a command, its output to log_path and, by lines, to echo. Returns (status, lines)."""
    lines = []
    with open(log_path, "w", encoding="utf-8", errors="replace") as log:
        log.write("$ " + " ".join(map(str, command)) + "\n")
        process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, env=environment, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in process.stdout:
            log.write(line)
            lines.append(line.rstrip("\n"))
            if echo is not None:
                echo(lines[-1])
        return process.wait(), lines


def local(tag):
    """An XML tag without its namespace."""
    return tag.rsplit("}", 1)[-1]


def without_location(text):
    """GoogleTest puts "file:line" on a line of its own before the message of a skip."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if len(lines) > 1 and re.fullmatch(r"\S+:\d+", lines[0]):
        lines = lines[1:]
    # GTEST_SKIP() << reason comes as "Skipped" and the reason in some versions.
    if len(lines) > 1 and lines[0] == "Skipped":
        lines = lines[1:]
    return " ".join(lines)


def parse_gtest_report(path, tree):
    """The cases of one GoogleTest XML report, or None when it is no such report (half written)."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError):
        return None
    if local(root.tag) != "testsuites":
        return None
    cases = []
    for suite in root:
        for case in suite:
            if local(case.tag) != "testcase":
                continue
            name = f"{case.get('classname', suite.get('name'))}.{case.get('name')}"
            children = {local(child.tag): child for child in case}
            if "failure" in children or "error" in children:
                child = children.get("failure", children.get("error"))
                message = (child.get("message") or child.text or "").strip()
                outcome, reason = FAILED, " ".join(message.split())[:300]
            elif "skipped" in children or case.get("result") == "skipped":
                child = children.get("skipped")
                text = "" if child is None else child.get("message") or child.text or ""
                outcome, reason = SKIPPED, without_location(text) or "no reason given"
            elif case.get("status") == "notrun":
                outcome, reason = SKIPPED, "switched off by its name (DISABLED)"
            else:
                outcome, reason = PASSED, ""
            cases.append(Case(tree, name, outcome, reason))
    return cases


def last_line(text):
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def report_of_protocol(test, build_dir, started):
    """The report of a test whose place meson itself chose (protocol: 'gtest'), or None."""
    if test.get("protocol") != "gtest":
        return None
    path = build_dir / (test.get("workdir") or "") / f"{test['name']}.xml"
    # An older one is of an earlier run.
    return path if path.is_file() and path.stat().st_mtime >= started else None


def reports_by_program(xml_dir):
    """GoogleTest reports by the name of their program: p.xml, and p_1.xml of its second run."""
    names = {path.stem for path in xml_dir.glob("*.xml")}
    reports = {}
    for path in sorted(xml_dir.glob("*.xml")):
        program = path.stem
        numbered = re.fullmatch(r"(.+)_\d+", program)
        if numbered and numbered.group(1) in names:
            program = numbered.group(1)
        reports.setdefault(program, []).append(path)
    return reports


def count_cases(tree, tests, build_dir, xml_dir, meson_log, started):
    """Turns meson's testlog.json and the GoogleTest reports of one suite into counted cases."""
    with open(meson_log, encoding="utf-8", errors="replace") as log:
        runs = [json.loads(line) for line in log if line.strip()]
    by_name = {test["name"]: test for test in tests}
    reports = reports_by_program(xml_dir)
    # Runs of one program share its reports: which run wrote which is not known and not needed.
    groups, by_program = [], {}
    for run in runs:
        command = run.get("command") or [run["name"]]
        program = os.path.basename(command[0])
        # Meson logs "project:suite / name".
        run["name"] = run["name"].split(" / ", 1)[-1]
        own = report_of_protocol(by_name.get(run["name"], {}), build_dir, started)
        if own is not None:
            groups.append(([run], [own]))
        elif program in reports:
            by_program.setdefault(program, []).append(run)
        else:
            groups.append(([run], []))
    groups.extend((members, reports[program]) for program, members in by_program.items())
    return [case for members, paths in groups for case in cases_of_group(tree, members, paths)]


def cases_of_group(tree, runs, paths):
    """The cases of the runs of one program, given its reports."""
    parsed = [cases for cases in (parse_gtest_report(path, tree) for path in paths)
              if cases is not None]
    cases = [case for report in parsed for case in report]
    unexplained = [run for run in runs if run["result"] not in GOOD_MESON_RESULTS]
    # Each report with a failure explains one failed run.
    explained = sum(any(case.outcome == FAILED for case in report) for report in parsed)
    unexplained = unexplained[explained:]
    for run in unexplained:
        status = run["result"].lower()
        if run.get("returncode"):
            status += f", exit status {run['returncode']}"
        output = (run.get("stdout") or "") + "\n" + (run.get("stderr") or "")
        sanitizer = SANITIZER_LINE.search(output)
        detail = sanitizer.group().strip() if sanitizer else last_line(output)
        cases.append(Case(tree, run["name"], FAILED, f"{status}: {detail}"[:300]))
    for run in runs if not parsed else []:
        outcome = GOOD_MESON_RESULTS.get(run["result"])
        if outcome is not None:
            reason = ""
            if outcome == SKIPPED:
                reason = last_line(run.get("stdout")) or "no reason given"
            cases.append(Case(tree, run["name"], outcome, reason))
    if parsed and not cases:
        cases.append(Case(tree, runs[0]["name"], FAILED, "the program ran no test case"))
    return cases


class Runner:
    """Carries one run of tools/test over the trees."""

    def __init__(self, root, arguments):
        self._root = root
        self._filters = arguments.filter
        self._keep_going = arguments.keep_going
        self._lint = arguments.lint
        chosen = arguments.tree or ([TREES[0].name] if arguments.quick else None)
        self._trees = [tree for tree in TREES if chosen is None or tree.name in chosen]
        self._jobs = arguments.jobs
        self._logs = root / "build" / "test-logs"
        self._cases = []
        self._seconds = {}
        self._prefix = []

    def run(self):
        """Returns the exit status."""
        self._logs.mkdir(parents=True, exist_ok=True)
        with open(self._logs.parent / ".test-lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("tools/test: another run uses this checkout; waiting for it.", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            shutil.rmtree(self._logs)
            self._logs.mkdir()
            self._console = Console(self._logs / "test.log")
            # ThreadSanitizer of GCC 12 cannot start where the kernel spreads addresses widely.
            if shutil.which("setarch") and self._succeeds(["setarch", platform.machine(), "-R",
                                                           "true"]):
                self._prefix = ["setarch", platform.machine(), "-R"]
            for tree in self._trees:
                started = time.monotonic()
                self._run_tree(tree)
                self._seconds[tree.name] = time.monotonic() - started
                if not self._keep_going and any(case.outcome == FAILED for case in self._cases):
                    left = [t.name for t in self._trees[self._trees.index(tree) + 1:]]
                    if left:
                        self._console.say(f"\nNot run after this failure: {', '.join(left)} "
                                          "(--keep-going runs them all the same).")
                    break
            return self._summarize()

    @staticmethod
    def _succeeds(command):
        return subprocess.run(command, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode == 0

    def _build_dir(self, tree):
        return self._root / "build" / tree.name

    def _fail(self, tree, what, reason):
        self._cases.append(Case(tree.name, what, FAILED, reason))

    def _step(self, tree, what, command, environment=None):
        """Runs a quiet step of a tree. If it fails: shows its faults and counts a failure."""
        log = self._logs / f"{tree.name}-{what}.log"
        started = time.monotonic()
        status, lines = run_logged(command, log, environment=environment, cwd=self._root)
        seconds = time.monotonic() - started
        if status == 0:
            if seconds >= 1:
                self._console.say(f"   {what}: {seconds:.0f} s")
            return True
        # The first error matters most, and much may follow it: start where a fault is named.
        faults = [i for i, line in enumerate(lines) if re.search(r"\berror\b|FAILED", line, re.I)]
        first = max(0, faults[0] - 2) if faults else max(0, len(lines) - 40)
        for line in lines[first:first + 40]:
            self._console.say("   | " + line[:300])
        self._console.say(f"   {what} failed, the whole output is in {log.relative_to(self._root)}")
        self._fail(tree, what, f"exit status {status}, see {log.relative_to(self._root)}")
        return False

    def _run_tree(self, tree):
        self._console.say(f"\n== {tree.name}")
        if not self._configure(tree):
            return
        tests = self._select(tree)
        if not tests:
            if self._filters:
                self._console.say("   no test matches the filter")
            return
        targets = [] if tree.build_all and not self._filters else self._targets(tree, tests)
        keep = ["-k", "0"] if self._keep_going else []
        build = ["ninja", "-C", self._build_dir(tree), "-j", self._jobs, *keep, *targets]
        if not self._step(tree, "build", build):
            return
        for suite in tree.suites:
            members = [test for test in tests if suite in suites_of(test)]
            if members:
                self._run_suite(tree, suite, members)
        if tree.lint and self._lint and not self._filters:
            self._run_lint(tree)

    def _configure(self, tree):
        """Sets the build directory up, or corrects the options of one that somebody else set up."""
        build_dir = self._build_dir(tree)
        options = [f"-D{name}={meson_value(value)}" for name, value in tree.options.items()]
        environment = {**os.environ, **tree.compilers}
        recorded = build_dir / "meson-info" / "intro-buildoptions.json"
        if not (build_dir / "build.ninja").exists() or not recorded.exists():
            # Half a set-up, of an interrupted run or of an error mended since, only misleads meson.
            shutil.rmtree(build_dir, ignore_errors=True)
            return self._step(tree, "setup", ["meson", "setup", build_dir, *options], environment)
        actual = {option["name"]: option["value"] for option in json.loads(recorded.read_text())}
        if all(same_option(actual.get(name), value) for name, value in tree.options.items()):
            return True
        return self._step(tree, "setup", ["meson", "configure", build_dir, *options], environment)

    def _select(self, tree):
        """The tests of the tree's suites that the filters choose, from meson's introspection."""
        # A meson.build that changed since is only read again by ninja.
        if not self._step(tree, "refresh", ["ninja", "-C", self._build_dir(tree), "build.ninja"]):
            return []
        info = self._build_dir(tree) / "meson-info" / "intro-tests.json"
        tests = json.loads(info.read_text())
        for suite in tree.suites:
            # A suite that vanished would otherwise pass in silence.
            if not any(suite in suites_of(test) for test in tests):
                self._fail(tree, suite, "meson knows of no test in this suite")
        tests = [test for test in tests if set(tree.suites) & suites_of(test)]
        if self._filters:
            tests = [test for test in tests
                     if any(word in test["name"] or fnmatch.fnmatch(test["name"], word)
                            for word in self._filters)]
        return tests

    def _targets(self, tree, tests):
        """What ninja has to build for these tests."""
        build_dir = self._build_dir(tree)
        info = json.loads((build_dir / "meson-info" / "intro-targets.json").read_text())
        files = {target["id"]: target["filename"] for target in info}
        wanted = {os.path.relpath(name, build_dir)
                  for test in tests for target in test["depends"] for name in files[target]}
        return sorted(wanted)

    def _run_suite(self, tree, suite, tests):
        self._console.say(f"-- {tree.name}: suite {suite}")
        build_dir = self._build_dir(tree)
        xml_dir = self._logs / f"{tree.name}-{suite}-gtest"
        xml_dir.mkdir()
        environment = {**os.environ, "GTEST_OUTPUT": f"xml:{xml_dir}/", "GTEST_COLOR": "no"}
        if tree.sanitized:
            for name, value in SANITIZER_ENVIRONMENT.items():
                environment.setdefault(name, value)
        command = [
            *(self._prefix if tree.sanitized else []),
            "meson", "test", "-C", build_dir, "--no-rebuild", "--print-errorlogs",
            "--num-processes", self._jobs, "--timeout-multiplier", tree.timeout_multiplier,
            "--logbase", f"testlog-{suite}", "--suite", suite,
            *([test["name"] for test in tests] if self._filters else []),
        ]
        started = time.time()
        status, _ = run_logged(command, self._logs / f"{tree.name}-{suite}.log",
                               echo=self._echo_meson, environment=environment, cwd=self._root)
        self._console.say(f"   {suite}: {time.time() - started:.0f} s")
        meson_logs = build_dir / "meson-logs"
        meson_log = meson_logs / f"testlog-{suite}.json"
        if not meson_log.exists() or meson_log.stat().st_mtime < started - 1:
            self._fail(tree, suite, f"meson test ran nothing, exit status {status}")
            return
        for path in meson_logs.glob(f"testlog-{suite}.*"):
            shutil.copy(path, self._logs / f"{tree.name}-{path.name}")
        cases = count_cases(tree.name, tests, build_dir, xml_dir, meson_log, started - 1)
        self._cases.extend(cases)
        if status != 0 and not any(case.outcome == FAILED for case in cases):
            self._fail(tree, suite, f"meson test failed with exit status {status}")
        if not cases:
            self._fail(tree, suite, "no test ran")

    def _run_lint(self, tree):
        """clang-tidy over all sources but the tests, counted as one test."""
        self._console.say(f"-- {tree.name}: tools/lint")
        command = [self._root / "tools" / "lint", "--no-tests", "--quick", "--build-dir",
                   self._build_dir(tree), "--jobs", self._jobs]
        started = time.monotonic()
        status, lines = run_logged(command, self._logs / f"{tree.name}-lint.log",
                                   echo=lambda line: self._console.say("   " + line),
                                   cwd=self._root)
        self._console.say(f"   lint: {time.monotonic() - started:.0f} s")
        outcome = {0: PASSED, 77: SKIPPED}.get(status, FAILED)
        self._cases.append(Case(tree.name, "lint", outcome, lines[-1] if lines else ""))

    def _echo_meson(self, line):
        if line.strip() and not line.startswith(("ninja:", "Full log written", "Unexpected Pass:",
                                                 "Expected Fail:")):
            self._console.say("   " + line.rstrip())

    def _summarize(self):
        """Prints skips, failures, the trees and the closing line. Returns the exit status."""
        say = self._console.say
        for outcome, title in ((SKIPPED, "Skipped"), (FAILED, "Failed")):
            # The same case of several trees is one line.
            trees = {}
            for case in self._cases:
                if case.outcome == outcome:
                    trees.setdefault((case.name, case.reason), []).append(case.tree)
            if trees:
                say(f"\n{title}:")
            for (name, reason), names in trees.items():
                say(f"   {name} ({', '.join(dict.fromkeys(names))}): {reason}")
        say()
        for name, seconds in self._seconds.items():
            say(f"{name}: {self._count(name)} in {seconds:.0f} s")
        say(f"Logs: {self._logs.relative_to(self._root)}")
        say(self._count())
        failed = any(case.outcome == FAILED for case in self._cases)
        ran = any(case.outcome == PASSED for case in self._cases)
        return 1 if failed or not ran else 0

    def _count(self, tree=None):
        cases = [case for case in self._cases if tree in (None, case.tree)]
        return ", ".join(f"{sum(case.outcome == outcome for case in cases)} {outcome}"
                         for outcome in (PASSED, FAILED, SKIPPED))


def suites_of(test):
    """A test's suites, without the project's name that meson puts before them."""
    return {suite.split(":")[-1] for suite in test["suite"]}


def meson_value(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(value) if isinstance(value, list) else str(value)


def same_option(actual, wanted):
    if isinstance(wanted, list) and isinstance(actual, str):
        return actual.split() == wanted
    return actual == wanted


def main():
    parser = argparse.ArgumentParser(prog="tools/test", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the optimized tree only")
    parser.add_argument("--tree", action="append", choices=[tree.name for tree in TREES],
                        help="this tree only; may be repeated")
    parser.add_argument("--keep-going", action="store_true", help="run all trees, whatever fails")
    parser.add_argument("--lint", action="store_true", help="clang-tidy over all sources too")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("filter", nargs="*", help="part of a meson test's name, or a glob")
    arguments = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parent.parent
    if not (root / "meson.build").exists():
        sys.exit(f"tools/test: there is no meson.build in {root}")
    with contextlib.suppress(KeyboardInterrupt):
        return Runner(root, arguments).run()
    return 130


if __name__ == "__main__":
    sys.exit(main())
