#!/usr/bin/env python3
"""Mechanical taste as a test: what a reviewer should not have to look for.

    python3 tools/tidy.py [--build-dir build/release] [--headers] [--self-test]

Each finding is a line "file:line: [rule] what is wrong; what to do". The rules:

    layer    who may include whom, read from the #include lines
    include  our headers are written from the repository root, in quotes, and exist
    layout   100 columns (unless a URL is in the line), no tabs, no trailing blanks, a final newline
    pragma   every header has #pragma once (Highway's re-included *-inl.h have their toggle)
    length   no function over 100 lines outside tests (over 70: a note)
    dead     every source file is in some meson.build, every header is included by another file
    word     no marks of unfinished work, no tests switched off by name
    place    no paths of one machine, no hosts of package registries
    sleep    nothing under tests/ and perf/ sleeps to be right
    threads  a test of the engine that makes threads is in the suite that ThreadSanitizer runs
    march    no -march outside perf/: SIMD goes through Highway's dynamic dispatch
    format   clang-format-19 agrees (not checked where it is not installed)
    header   with --headers: every header of the engine and the tools compiles alone

Files are those that git tracks or does not ignore. --build-dir names a configured meson build: its
compile_commands.json gives the flags for --headers, its introspection the sources of each target
and the suites of each test.
--self-test runs the rules over small trees with one fault each, and fails if a fault goes unseen.
"""

import argparse
import ast
import collections
import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

COLUMNS_MAX = 100
FUNCTION_LINES_NOTED = 70
FUNCTION_LINES_MAX = 100
FILE_LINES_NOTED = 700

SOURCE_DIRS = ("src/", "index/", "dataplane/", "tests/", "perf/", "tools/")
# Headers of these compile alone. Not src/control/: one Beast or gRPC header costs 20 s to parse.
STANDALONE_DIRS = ("src/core/", "index/", "dataplane/", "tools/", "src/")
NOT_STANDALONE_DIRS = ("src/control/",)
# Generated headers: no file of the repository, so only the layer rule looks at them.
GENERATED_PREFIXES = ("engram/v1/",)

# A file's layer is the first prefix of its path. tests/ and perf/ may include anything.
LAYERS = (
    ("src/core/", ("src/core/",)),
    ("index/", ("src/core/", "index/")),
    ("dataplane/", ("src/core/", "dataplane/")),
    ("src/control/", ("src/", "index/", "dataplane/", "engram/v1/")),
    ("src/", ("src/", "index/", "dataplane/")),
    ("tools/", ("src/core/", "src/control/config_", "src/control/core_map.", "tools/",
                "dataplane/frame_", "index/log/", "index/checkpoint/",
                "src/checkpoint_manifest.", "src/missing_checkpoint.", "src/replay_crashes.")),
)
FREE_DIRS = ("tests/", "perf/")
ENGINE_DIRS = ("src/core/", "index/", "dataplane/")

# Libraries that only some files may see: pattern of the include, paths that may, why.
OWNED_LIBRARIES = (
    (re.compile(r"toml(\+\+|plusplus|\.h)"), ("src/control/config_loader.",),
     "only src/control/config_loader sees TOML; take a plain struct from it"),
    (re.compile(r"(grpc|grpcpp|google/protobuf)/"), ("src/control/",),
     "gRPC and protobuf stay in src/control/"),
    (re.compile(r"boost/(beast|asio)"), ("src/control/",),
     "Beast stays in src/control/"),
)
# The engine builds without these: nothing but a compiler, liburing, hwloc, libnuma, ISA-L, Highway.
NOT_IN_ENGINE = re.compile(r"(boost|CLI|spdlog|fmt|simdjson|rapidjson|nlohmann|prometheus)[/.]")

# Joined from halves, so that this file passes its own rules.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" "DO", "FIX" "ME", "XX" "X", "HA" "CK")) + r")\b")
UNFINISHED_COMMENT = re.compile(
    r"\b(" + "|".join(("place" "holder", "st" "ub", "not imple" "mented", "unimple" "mented"))
    + r")\b", re.I)
SWITCHED_OFF_TEST = re.compile(r"\b(TEST|TEST_F|TEST_P|TYPED_TEST)\s*\([^)]*\bDIS" r"ABLED_")
MACHINE_PATH = re.compile(r"/wo" r"rk/|/tmp/bash_" r"jobs")
REGISTRY_HOST = re.compile(
    r"https?://[^ )\"]*(debian|npm|pypi|crates\.io)|\bdeb\.deb" r"ian\.org|\bregistry\.np" r"mjs|"
    r"\bpypi\.o" r"rg|\bproxy\.gol" r"ang\.org|\bfiles\.python" r"hosted\.org")
THREAD = re.compile(r"\bstd::(thread|jthread|async)\b")
SLEEP = re.compile(r"\b(sleep_for|sleep_until|usleep|nanosleep|sleep)\s*\(")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">\n]+)[">]', re.M)
TARGET_INCLUDE = re.compile(r'^[ \t]*#[ \t]*define[ \t]+HWY_TARGET_INCLUDE[ \t]+"([^"\n]+)"', re.M)

Finding = collections.namedtuple("Finding", "path line rule message")


def has_prefix(path, prefixes):
    return path.startswith(tuple(prefixes))


class Repository:
    """The files under the rules, read once."""

    def __init__(self, root):
        self.root = pathlib.Path(root)
        self.files = sorted(path for path in self._list() if self._is_regular(path))
        self._known = set(self.files)
        self.kinds = {path: self._kind(path) for path in self.files}

    def _is_regular(self, path):
        full = self.root / path
        return full.is_file() and not full.is_symlink()

    def _list(self):
        listing = subprocess.run(
            ["git", "-C", str(self.root), "ls-files", "-co", "--exclude-standard", "-z"],
            capture_output=True, check=False) if shutil.which("git") else None
        if listing is not None and listing.returncode == 0:
            return {name.decode() for name in listing.stdout.split(b"\0") if name}
        # An unpacked archive has no git: everything but hidden and build directories.
        names = set()
        for directory, subdirectories, files in os.walk(self.root):
            subdirectories[:] = [d for d in subdirectories if not d.startswith((".", "build"))]
            names.update(os.path.relpath(os.path.join(directory, f), self.root) for f in files)
        return names

    def _kind(self, path):
        name = os.path.basename(path)
        if name.endswith((".h", ".cc")):
            return "c++"
        if name.endswith(".py"):
            return "python"
        if name in ("meson.build", "meson_options.txt"):
            return "meson"
        if name.endswith((".sh", ".bash")):
            return "shell"
        if name.endswith((".md", ".toml", ".yml", ".yaml", ".proto")):
            return name.rsplit(".", 1)[1]
        if "." not in name.lstrip("."):
            with open(self.root / path, "rb") as file:
                first = file.readline(120)
            if first.startswith(b"#!"):
                return "python" if b"python" in first else "shell" if b"sh" in first else "data"
        return "data"

    def of_kind(self, *kinds):
        return [path for path in self.files if self.kinds[path] in kinds]

    def exists(self, path):
        return path in self._known

    @functools.lru_cache(maxsize=None)
    def text(self, path):
        return (self.root / path).read_text(encoding="utf-8", errors="replace")

    @functools.lru_cache(maxsize=None)
    def includes(self, path):
        """(line, quote or angle bracket, included path) of each #include."""
        text = self.text(path)
        found = [(line_of(text, m.start(1)), m.group(1), m.group(2))
                 for m in INCLUDE.finditer(text)]
        found += [(line_of(text, m.start(1)), '"', m.group(1))
                  for m in TARGET_INCLUDE.finditer(text)]
        return found

    @functools.lru_cache(maxsize=None)
    def reached(self, path):
        """The path and all files of the repository that it includes, directly or not."""
        seen, waiting = {path}, [path]
        while waiting:
            for _, _, included in self.includes(waiting.pop()):
                if included not in seen and self.exists(included):
                    seen.add(included)
                    waiting.append(included)
        return frozenset(seen)


def line_of(text, position):
    return text.count("\n", 0, position) + 1


# The order matters: a raw string may hold quotes, a number may hold ' between its digits.
CPP_TOKEN = re.compile(
    r'(?P<raw>\b(?:u8|u|U|L)?R"(?P<mark>[^()\s\\"]{0,16})\(.*?\)(?P=mark)")'
    r"|(?P<number>\b\d[\w']*)"
    r"|(?P<comment>//(?:\\\n|[^\n])*|/\*.*?\*/)"
    r'|(?P<string>"(?:\\.|[^"\\\n])*")'
    r"|(?P<char>'(?:\\.|[^'\\\n])+')", re.S)


def blank(text):
    return re.sub(r"[^\n]", " ", text)


def split_cpp(text):
    """(code with comments and literals blanked, comments with everything else blanked)."""
    code, comments, end = [], [], 0
    for token in CPP_TOKEN.finditer(text):
        between, whole = text[end:token.start()], token.group()
        code.append(between)
        comments.append(blank(between))
        code.append(whole if token.lastgroup == "number" else blank(whole))
        comments.append(whole if token.lastgroup == "comment" else blank(whole))
        end = token.end()
    code.append(text[end:])
    comments.append(blank(text[end:]))
    return "".join(code), "".join(comments)


def without_preprocessor(code):
    """Blanks directives, and of each conditional all branches but the first, so braces balance."""
    lines, out, skipping, continued = code.split("\n"), [], [], False
    for line in lines:
        directive = re.match(r"\s*#\s*(\w+)", line) if not continued else None
        if directive:
            word = directive.group(1)
            if word in ("if", "ifdef", "ifndef"):
                skipping.append(False)
            elif word in ("else", "elif") and skipping:
                skipping[-1] = True
            elif word == "endif" and skipping:
                skipping.pop()
        hidden = bool(directive) or continued or any(skipping)
        continued = (bool(directive) or continued) and line.rstrip().endswith("\\")
        out.append(" " * len(line) if hidden else line)
    return "\n".join(out)


def without_nested(head):
    """Drops template parameter lists, attributes and what stands in parentheses."""
    head = re.sub(r"\[\[.*?\]\]", " ", head, flags=re.S)
    while True:
        start = re.search(r"\btemplate\s*<", head)
        if not start:
            break
        depth, end = 0, start.end() - 1
        while end < len(head):
            depth += {"<": 1, ">": -1}.get(head[end], 0)
            end += 1
            if depth == 0:
                break
        head = head[:start.start()] + " " + head[end:]
    count = 1
    while count:  # innermost first; \0 stands for a pair that is done
        head, count = re.subn(r"\([^()]*\)", "\0", head)
    return head.replace("\0", "()")


def brace_kind(head):
    """What a { at namespace or class scope opens: "scope", "function" or "init" (a value)."""
    head = without_nested(head)
    head = re.sub(r"^\s*(public|protected|private)\s*:(?!:)", "", head).strip()
    if re.match(r"(inline\s+)?namespace\b|extern\b\s*$", head):
        return "scope"
    if re.match(r"((typedef|static|inline|constexpr|const)\s+)*(class|struct|union|enum)\b", head):
        return "scope"
    if "(" not in head:
        return "init"
    plain = re.sub(r"\boperator\s*[^\s\w(]+", "operator", head)
    if "=" in plain:
        # A lambda kept in a variable, or a value.
        return "function" if re.search(r"\]\s*(\(\))?[^=\]]*$", plain) else "init"
    initializers = re.search(r"\)\s*(noexcept\s*(\(\))?\s*)?:(?!:)", plain)
    if initializers and re.search(r"[\w>]$", plain):
        return "init"  # member{value} in a constructor's initializer list
    return "function"


def cpp_functions(text):
    """(name, first line, last line) of each function body outside other functions. A heuristic."""
    code = without_preprocessor(split_cpp(text)[0])
    functions, stack, head_start, depth, begun = [], [], 0, 0, 0
    for match in re.finditer(r"[{};]", code):
        mark, position = match.group(), match.start()
        if depth > 0:  # inside a function only its own end matters
            depth += {"{": 1, "}": -1}.get(mark, 0)
            if depth == 0:
                functions.append((name, line_of(code, begun), line_of(code, position)))
                head_start = position + 1
        elif mark == "{":
            head = code[head_start:position]
            kind = "init" if "init" in stack[-1:] else brace_kind(head)
            if kind == "function":
                depth = 1
                begun = head_start + len(head) - len(head.lstrip())
                called = re.findall(r"([~\w]+)\s*\(", without_nested(head))
                name = called[0] if called else "a function"
            else:
                stack.append(kind)
                if kind == "scope":
                    head_start = position + 1
        elif mark == "}":
            if stack and stack.pop() == "scope":
                head_start = position + 1
        elif "init" not in stack[-1:]:
            head_start = position + 1
    return functions


def python_functions(text):
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return [(f"syntax error ({error.msg})", error.lineno or 1, 10**6)]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(n.name, n.lineno, n.end_lineno) for n in ast.walk(tree) if isinstance(n, kinds)]


def check_layers(repo):
    for path in repo.of_kind("c++"):
        if has_prefix(path, FREE_DIRS):
            continue
        allowed = next((targets for prefix, targets in LAYERS if path.startswith(prefix)), None)
        for line, quote, included in repo.includes(path):
            own = repo.exists(included) or has_prefix(included, GENERATED_PREFIXES)
            if own and allowed is not None and not has_prefix(included, allowed):
                yield Finding(path, line, "layer",
                              f"{included} is not for this layer, which may include only "
                              f"{', '.join(allowed)}; move the code, or pass what it needs down")
            for pattern, owners, remedy in OWNED_LIBRARIES:
                if pattern.match(included) and not has_prefix(path, owners):
                    yield Finding(path, line, "layer", f"{included}: {remedy}")
            if has_prefix(path, ENGINE_DIRS) and quote == "<" and NOT_IN_ENGINE.match(included):
                yield Finding(path, line, "layer",
                              f"{included}: the engine builds without this library; "
                              "use it in src/ or tools/")


def check_includes(repo):
    for path in repo.of_kind("c++"):
        for line, quote, included in repo.includes(path):
            if has_prefix(included, GENERATED_PREFIXES):
                continue
            if quote == "<":
                if repo.exists(included):
                    yield Finding(path, line, "include",
                                  f"<{included}> is ours; write it in quotes")
            elif not repo.exists(included):
                beside = os.path.normpath(os.path.join(os.path.dirname(path), included))
                remedy = (f'write "{beside}", from the repository root' if repo.exists(beside)
                          else "write a library's header in <>, or mend the path")
                yield Finding(path, line, "include", f'"{included}" is no file here; {remedy}')


def check_layout(repo):
    code = ("c++", "python", "meson", "shell")
    for path in repo.of_kind(*code, "toml", "yml", "yaml", "proto", "md"):
        text, kind = repo.text(path), repo.kinds[path]
        if text and not text.endswith("\n"):
            yield Finding(path, line_of(text, len(text)), "layout", "no final newline; add one")
        for number, line in enumerate(text.split("\n"), 1):
            if kind in code and len(line) > COLUMNS_MAX and "://" not in line:
                yield Finding(path, number, "layout",
                              f"{len(line)} columns; break the line at {COLUMNS_MAX}")
            if kind != "md" and "\t" in line:
                yield Finding(path, number, "layout", "a tab; indent with spaces, write \\t")
            if kind != "md" and line != line.rstrip():
                yield Finding(path, number, "layout", "blanks at the end of the line; remove them")


def check_pragma(repo):
    for path in repo.of_kind("c++"):
        text = repo.text(path)
        if not path.endswith(".h") or re.search(r"^#pragma once$", text, re.M):
            continue
        if path.endswith("-inl.h") and "HWY_TARGET_TOGGLE" in text:
            continue
        yield Finding(path, 1, "pragma", "no #pragma once; put it before the first #include")


def check_lengths(repo, notes):
    long = []
    for path in repo.of_kind("c++", "python"):
        if path.startswith("tests/"):
            continue
        text = repo.text(path)
        functions = cpp_functions(text) if repo.kinds[path] == "c++" else python_functions(text)
        for name, first, last in functions:
            lines = last - first + 1
            if lines > FUNCTION_LINES_MAX:
                yield Finding(path, first, "length",
                              f"{name} is {lines} lines; split it by its steps "
                              f"(at most {FUNCTION_LINES_MAX})")
            elif lines > FUNCTION_LINES_NOTED:
                long.append(f"{path}:{first} {name} ({lines})")
    if long:
        notes.append(f"{len(long)} functions over {FUNCTION_LINES_NOTED} lines: " + ", ".join(long))
    large = [f"{path} ({repo.text(path).count(chr(10))})" for path in repo.of_kind("c++")
             if repo.text(path).count("\n") > FILE_LINES_NOTED]
    if large:
        notes.append(f"{len(large)} files over {FILE_LINES_NOTED} lines: " + ", ".join(large))


def meson_literals(repo):
    """Every quoted string of every meson.build, with the directory it stands in."""
    for path in repo.of_kind("meson"):
        text = re.sub(r"#[^\n']*$", "", repo.text(path), flags=re.M)
        for literal in re.findall(r"'([^'\n]+)'", text):
            yield os.path.dirname(path), literal


def built_sources(repo, build_dir):
    """Sources of the configured targets, from meson's introspection."""
    info = pathlib.Path(build_dir or "") / "meson-info" / "intro-targets.json"
    if build_dir is None or not info.exists():
        return set()
    names = {name for target in json.loads(info.read_text())
             for group in target["target_sources"] for name in group.get("sources", ())}
    return {os.path.relpath(name, repo.root.resolve()) for name in names}


def stem_of(path):
    return re.sub(r"(_test|_benchmark|_bench|_fuzz|_fuzzer)?(\.cc|\.py)?$", "",
                  os.path.basename(path))


def check_dead(repo, build_dir):
    built, named = built_sources(repo, build_dir), set()
    stems = collections.Counter()
    for directory, literal in set(meson_literals(repo)):
        named.add(os.path.normpath(os.path.join(directory, literal)))
        named.add(os.path.normpath(literal))
        if "." not in literal:
            stems[os.path.basename(literal)] += 1
    # A meson.build may name tests and benchmarks by their stems, in a foreach: each such literal,
    # however often it stands there, is one file, and the targets of this configuration that are not
    # named as a whole have taken theirs.
    stems.subtract(stem_of(path) for path in built - named
                   if has_prefix(path, FREE_DIRS) and path.endswith(".cc"))
    listed = built | named
    included = {target for path in repo.of_kind("c++")
                for _, _, target in repo.includes(path) if target != path}
    for path in repo.of_kind("c++", "python"):
        if not has_prefix(path, SOURCE_DIRS):
            continue
        if repo.kinds[path] == "python" and not re.match(r"tests/.*_test\.py$", path):
            continue
        if path.endswith(".h"):
            if path not in included:
                yield Finding(path, 1, "dead", "no other file includes it; use or delete it")
            continue
        if path in listed or path in included:
            continue
        if has_prefix(path, FREE_DIRS) and stems[stem_of(path)] > 0:
            stems[stem_of(path)] -= 1
            continue
        yield Finding(path, 1, "dead", "no meson.build lists this file; list or delete it")


def check_words(repo):
    for path in repo.of_kind("c++", "python", "meson", "shell"):
        text, kind = repo.text(path), repo.kinds[path]
        comments = split_cpp(text)[1] if kind == "c++" else "\n".join(
            (re.search(r"(?<!\S)#.*", line) or [""])[0] for line in text.split("\n"))
        rules = [(UNFINISHED, text, "marks unfinished work; finish it, or say what is true today"),
                 (SWITCHED_OFF_TEST, text, "a test switched off by name; mend or delete it")]
        # gRPC's word for a client object is one of these.
        if not path.startswith("src/control/"):
            rules.append((UNFINISHED_COMMENT, comments,
                          "marks unfinished work; finish it, or say what is true today"))
        for pattern, where, remedy in rules:
            for match in pattern.finditer(where):
                yield Finding(path, line_of(where, match.start()), "word",
                              f'"{match.group().strip()}" {remedy}')


def check_places(repo):
    kinds = ("c++", "python", "meson", "shell", "md", "toml", "yml", "yaml", "proto")
    for path in repo.of_kind(*kinds):
        text = repo.text(path)
        for match in MACHINE_PATH.finditer(text):
            yield Finding(path, line_of(text, match.start()), "place",
                          f"{match.group()} is a path of one machine; write it from the root")
        for match in REGISTRY_HOST.finditer(text):
            yield Finding(path, line_of(text, match.start()), "place",
                          f"{match.group()} is a registry's host; name the package instead")


def check_sleeps(repo):
    for path in repo.of_kind("c++", "python", "shell"):
        if not has_prefix(path, FREE_DIRS):
            continue
        text = repo.text(path)
        text = split_cpp(text)[0] if repo.kinds[path] == "c++" else text
        for match in SLEEP.finditer(text):
            yield Finding(path, line_of(text, match.start()), "sleep",
                          f"{match.group(1)}: wait on a condition, or step the simulated clock")


def check_threads(repo, build_dir):
    info = pathlib.Path(build_dir or "") / "meson-info"
    if build_dir is None or not (info / "intro-tests.json").exists():
        return
    targets = {target["id"]: target
               for target in json.loads((info / "intro-targets.json").read_text())}
    for test in json.loads((info / "intro-tests.json").read_text()):
        suites = {suite.split(":")[-1] for suite in test["suite"]}
        if "engine" not in suites or "threads" in suites:
            continue
        sources = {os.path.relpath(os.path.join(repo.root.resolve(), name), repo.root.resolve())
                   for depends in test["depends"]
                   for group in targets[depends]["target_sources"]
                   for name in group.get("sources", ())}
        for path in sorted({path for source in sources if repo.exists(source)
                            for path in repo.reached(source) if path.startswith("tests/")}):
            match = THREAD.search(split_cpp(repo.text(path))[0])
            if match:
                yield Finding(path, line_of(repo.text(path), match.start()), "threads",
                              f"add {test['name']} to threaded_tests in tests/meson.build")


def check_march(repo):
    for path in repo.of_kind("meson"):
        if path.startswith("perf/"):
            continue
        for match in re.finditer(r"-march=", repo.text(path)):
            yield Finding(path, line_of(repo.text(path), match.start()), "march",
                          "-march binds the build to one CPU; use Highway's dynamic dispatch")


def processors():
    return len(os.sched_getaffinity(0))


def check_format(repo, notes):
    files = repo.of_kind("c++")
    if not files:
        return
    if not shutil.which("clang-format-19") or not repo.exists(".clang-format"):
        notes.append("format not checked: clang-format-19 is not installed (tools/setup does it)")
        return
    batches = [files[i::processors()] for i in range(processors())]

    def run(batch):
        return subprocess.run(["clang-format-19", "--dry-run", "-Werror", "--style=file", *batch],
                              cwd=repo.root, capture_output=True, text=True, check=False).stderr

    with concurrent.futures.ThreadPoolExecutor(processors()) as pool:
        output = "".join(pool.map(run, [batch for batch in batches if batch]))
    seen = set()
    for path, line in re.findall(r"^(\S+?):(\d+):\d+: error:", output, re.M):
        if path not in seen:  # one line a file says enough
            seen.add(path)
            yield Finding(path, int(line), "format", f"run clang-format-19 -i {path}")


def compile_entries(repo, build_dir):
    """Of compile_commands.json: source -> (compiler, flags that matter to parsing, directory)."""
    entries = {}
    for entry in json.loads((build_dir / "compile_commands.json").read_text()):
        directory = pathlib.Path(entry["directory"])
        source = os.path.relpath((directory / entry["file"]).resolve(), repo.root.resolve())
        words = entry.get("arguments") or shlex.split(entry["command"])
        words = [word for word in words if os.path.basename(word) != "ccache"]
        flags, take = [], False
        for word in words[1:]:
            if take or word in ("-isystem", "-I", "-iquote", "-D"):
                flags.append(word)
                take = not take
            elif word.startswith("-fsanitize") or "_FORTIFY_SOURCE" in word:
                continue  # the first is no matter of parsing, the second asks for an optimizer
            elif re.match(r"-(isystem|I|iquote|D|U|std=|W(?!invalid-pch|p,|l,)|m|f|pthread)", word):
                flags.append(word)
        entries.setdefault(source, (words[0], tuple(flags), directory))
    return entries


def check_headers(repo, build_dir, notes):
    """Compiles each header alone, with the flags of a source that includes it."""
    if not (build_dir / "compile_commands.json").exists():
        yield Finding(str(build_dir), 1, "header",
                      "no compile_commands.json; give a configured --build-dir")
        return
    entries = compile_entries(repo, build_dir)
    compilers = {entry[0] for entry in entries.values()}
    versions = {c: subprocess.run([c, "--version"], capture_output=True, check=False).stdout
                for c in compilers}
    headers = [path for path in repo.of_kind("c++")
               if path.endswith(".h") and not path.endswith("-inl.h")
               and has_prefix(path, STANDALONE_DIRS) and not has_prefix(path, NOT_STANDALONE_DIRS)]
    cache_file = build_dir / "tidy-headers.json"
    try:
        known = set(json.loads(cache_file.read_text()))
    except (OSError, ValueError):
        known = set()
    good, work, strangers = set(), [], []
    for header in headers:
        users = [source for source in sorted(entries)
                 if repo.exists(source) and header in repo.reached(source)]
        if not users:
            strangers.append(header)
            continue
        # Its own source file, if it has one, has the flags that fit best.
        own = header[:-2] + ".cc"
        compiler, flags, directory = entries[own if own in users else users[0]]
        digest = hashlib.sha256(repr((header, compiler, flags)).encode() + versions[compiler])
        for path in sorted(repo.reached(header)):
            digest.update(repo.text(path).encode())
        if digest.hexdigest() in known:
            good.add(digest.hexdigest())
        else:
            command = [compiler, *flags, "-Werror", "-fsyntax-only", "-x", "c++", "-"]
            work.append((header, command, directory, digest.hexdigest()))

    def run(item):
        header, command, directory, _ = item
        return subprocess.run(command, cwd=directory, input=f'#include "{header}"\n',
                              capture_output=True, text=True, check=False)

    with concurrent.futures.ThreadPoolExecutor(processors()) as pool:
        for (header, _, _, key), result in zip(work, pool.map(run, work)):
            if result.returncode == 0:
                good.add(key)
                continue
            error = re.search(r"^.*?:(\d+):\d+: (?:fatal )?error: (.*)$", result.stderr, re.M)
            line, message = (int(error.group(1)), error.group(2)) if error else (1, result.stderr)
            yield Finding(header, line, "header",
                          f"does not compile alone: {message.strip()[:200]}; include what it uses")
    cache_file.write_text(json.dumps(sorted(good)))
    notes.append(f"{len(headers) - len(strangers)} headers compile alone "
                 f"({len(work)} compiled, the others unchanged)")
    if strangers:
        notes.append("in no target of this build, so not compiled: " + ", ".join(strangers))


def run_checks(root, build_dir=None, headers=False):
    """All findings and notes for the tree at root."""
    repo, notes = Repository(root), []
    findings = []
    for check in (check_layers, check_includes, check_layout, check_pragma, check_words,
                  check_places, check_sleeps, check_march):
        findings.extend(check(repo))
    findings.extend(check_lengths(repo, notes))
    findings.extend(check_dead(repo, build_dir))
    findings.extend(check_threads(repo, build_dir))
    findings.extend(check_format(repo, notes))
    if headers:
        findings.extend(check_headers(repo, build_dir, notes))
    return sorted(set(findings)), notes, len(repo.files)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=pathlib.Path, help="a configured meson build directory")
    parser.add_argument("--headers", action="store_true", help="compile every header alone")
    parser.add_argument("--self-test", action="store_true", help="try the rules on small trees")
    arguments = parser.parse_args()
    if arguments.self_test:
        import tidy_self_test
        return tidy_self_test.run()
    if arguments.headers and arguments.build_dir is None:
        parser.error("--headers needs --build-dir")
    root = pathlib.Path(__file__).resolve().parent.parent
    findings, notes, files = run_checks(root, arguments.build_dir, arguments.headers)
    for finding in findings:
        print(f"{finding.path}:{finding.line}: [{finding.rule}] {finding.message}")
    for note in notes:
        print(f"note: {note}")
    print(f"tidy: {files} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
