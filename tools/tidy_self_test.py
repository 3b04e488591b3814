"""Tries each rule of tidy.py on small trees with one fault each: tools/tidy.py --self-test."""

import json
import pathlib
import shutil
import subprocess
import tempfile

import tidy


def function_of(lines, head="int F() {"):
    """A C++ function of so many lines, for the self-test."""
    return "\n".join([head, "  int a = 0;", *["  ++a;"] * (lines - 4), "  return a;", "}"]) + "\n"


CLEAN_TREE = {
    "meson.build": "executable('a', 'src/main.cc', 'index/shard.cc')\n"
                   "foreach name : ['core/ids']\n  test(name, name)\nendforeach\n",
    "src/main.cc": '#include "index/shard.h"\n#include "src/core/ids.h"\n\nint main() {}\n',
    "src/core/ids.h": "#pragma once\n\n#include <cstdint>\n\nusing Id = uint64_t;\n",
    "index/shard.h": '#pragma once\n\n#include "src/core/ids.h"\n\nId Next(Id id);\n',
    "index/shard.cc": '#include "index/shard.h"\n\nId Next(Id id) { return id + 1; }\n',
    "tests/core/ids_test.cc": '#include "src/core/ids.h"\n\nId id = 1;\n',
    "README.md": "A line that ends in two blanks breaks here.  \n" + "word " * 40 + "\n",
}

def threaded_test(suites):
    """A test that makes a thread, and what meson says of it."""
    return {
        "tests/core/ids_test.cc": '#include "src/core/ids.h"\n\n#include <thread>\n\n'
                                  "void Run() { std::thread([] {}).join(); }\n",
        "build/meson-info/intro-tests.json": json.dumps(
            [{"name": "ids", "suite": suites, "depends": ["t"]}]),
        "build/meson-info/intro-targets.json": json.dumps(
            [{"id": "t", "target_sources": [{"sources": ["tests/core/ids_test.cc"]}]}])}


# What is changed in the clean tree, and the rule and the file that must be named for it. None: the
# change is allowed, and nothing may be reported.
SELF_TESTS = (
    ("a clean tree", {}, None, None),
    ("core includes index", {"src/core/ids.h": '#pragma once\n\n#include "index/shard.h"\n'},
     "layer", "src/core/ids.h"),
    ("index includes dataplane",
     {"index/shard.cc": '#include "dataplane/decoder.h"\n#include "index/shard.h"\n',
      "dataplane/decoder.h": "#pragma once\n"}, "layer", "index/shard.cc"),
    ("dataplane includes index",
     {"dataplane/a.cc": '#include "index/shard.h"\n', "meson.build+": "x = 'dataplane/a.cc'\n"},
     "layer", "dataplane/a.cc"),
    ("a tool includes index",
     {"tools/a.cc": '#include "index/shard.h"\n', "meson.build+": "x = 'tools/a.cc'\n"},
     "layer", "tools/a.cc"),
    ("a tool includes the wire grammar",
     {"tools/a.cc": '#include "dataplane/frame_format.h"\n', "meson.build+": "x = 'tools/a.cc'\n",
      "dataplane/frame_format.h": "#pragma once\n"}, None, None),
    ("protobuf outside control", {"src/main.cc": '#include "engram/v1/engram.pb.h"\n\n'
                                                 '#include "index/shard.h"\n'},
     "layer", "src/main.cc"),
    ("TOML outside the loader", {"src/main.cc": '#include <toml++/toml.h>\n\n'
                                                '#include "index/shard.h"\n'},
     "layer", "src/main.cc"),
    ("Boost in the engine", {"index/shard.cc": '#include "index/shard.h"\n\n'
                                               "#include <boost/lockfree/queue.hpp>\n"},
     "layer", "index/shard.cc"),
    ("a relative include", {"index/shard.cc": '#include "shard.h"\n'}, "include", "index/shard.cc"),
    ("a missing include", {"index/shard.cc": '#include "index/shard.h"\n#include "index/x.h"\n'},
     "include", "index/shard.cc"),
    ("our header in <>", {"index/shard.cc": "#include <index/shard.h>\n"},
     "include", "index/shard.cc"),
    ("a wide line", {"index/shard.cc": '#include "index/shard.h"\n// ' + "x" * 98 + "\n"},
     "layout", "index/shard.cc"),
    ("a wide line with a URL",
     {"index/shard.cc": '#include "index/shard.h"\n// See ftp://' + "x" * 98 + "\n"}, None, None),
    ("a wide shell script", {"tools/run": "#!/bin/sh\n# " + "x" * 100 + "\n"},
     "layout", "tools/run"),
    ("a tab", {"tools/a.py": "if True:\n\tpass\n"}, "layout", "tools/a.py"),
    ("a trailing blank", {"tools/a.py": "a = 1 \n"}, "layout", "tools/a.py"),
    ("no final newline", {"tools/a.py": "a = 1"}, "layout", "tools/a.py"),
    ("no pragma once", {"src/core/ids.h": "#include <cstdint>\n\nusing Id = uint64_t;\n"},
     "pragma", "src/core/ids.h"),
    ("a long function", {"index/shard.cc": '#include "index/shard.h"\n\n' + function_of(101)},
     "length", "index/shard.cc"),
    ("a function of the largest size",
     {"index/shard.cc": '#include "index/shard.h"\n\n' + function_of(100)}, None, None),
    ("a long method after braces that open no function",
     {"index/shard.cc": '#include "index/shard.h"\n\nnamespace a {\n'
                        "constexpr int kTable[] = {1'000, 2};\nstruct S {\n"
                        "  S() : a_{1}, b_(2) {}\n  int a_{0};\n  int b_ = {0};\n"
                        '  const char* text = "{{{";  // {{{\n'
                        + function_of(101, "int Long(int x = (1)) const noexcept {")
                        + "};\n}  // namespace a\n"}, "length", "index/shard.cc"),
    ("a long namespace of short functions",
     {"index/shard.cc": '#include "index/shard.h"\n\nnamespace a {\n' + function_of(60)
                        + function_of(60) + "}  // namespace a\n"}, None, None),
    ("a long Python function", {"tools/a.py": "def f():\n" + "    a = 1\n" * 100},
     "length", "tools/a.py"),
    ("a long test", {"tests/core/ids_test.cc": '#include "src/core/ids.h"\n\n' + function_of(150)},
     None, None),
    ("an unlisted source", {"index/dead.cc": '#include "index/shard.h"\n'},
     "dead", "index/dead.cc"),
    ("an unlisted test", {"tests/index/shard_test.cc": '#include "index/shard.h"\n'},
     "dead", "tests/index/shard_test.cc"),
    ("a test listed by its stem beside it",
     {"tests/fuzz/meson.build": "foreach name : ['ids']\nendforeach\n",
      "tests/fuzz/ids_fuzz.cc": '#include "src/core/ids.h"\n'}, None, None),
    ("a test listed by its stem, and a benchmark of that stem listed as a whole",
     {"perf/meson.build": "executable('ids_bench', 'ids_bench.cc')\n",
      "perf/ids_bench.cc": '#include "src/core/ids.h"\n\nId id = 1;\n'}, None, None),
    ("an unlisted test with the name of a listed one",
     {"tests/index/ids_test.cc": '#include "src/core/ids.h"\n'}, "dead", "tests/index/ids_test.cc"),
    ("an unlisted Python test", {"tests/system/start_test.py": "a = 1\n"},
     "dead", "tests/system/start_test.py"),
    ("a header nobody includes", {"index/dead.h": "#pragma once\n"}, "dead", "index/dead.h"),
    ("a test with threads in the usual suite", threaded_test(["p:engine"]),
     "threads", "tests/core/ids_test.cc"),
    ("a test with threads in their suite", threaded_test(["p:engine", "p:threads"]), None, None),
    ("an ignored file", {"build/dead.cc": "\tx\n", ".gitignore": "/build/\n"}, None, None),
    ("an unfinished piece", {"tools/a.py": "a = 1  # TO" "DO: more\n"}, "word", "tools/a.py"),
    ("an unfinished comment",
     {"index/shard.cc": '#include "index/shard.h"\n// Not imple' "mented.\n"},
     "word", "index/shard.cc"),
    ("a test switched off",
     {"tests/core/ids_test.cc": '#include "src/core/ids.h"\n\nTEST(Ids, DIS' "ABLED_Wrap) {}\n"},
     "word", "tests/core/ids_test.cc"),
    ("a path of one machine", {"README.md": "Look into /wo" "rk/main.\n"}, "place", "README.md"),
    ("a registry", {"tools/a.py": 'url = "https://registry.np' 'mjs.org/x"\n'},
     "place", "tools/a.py"),
    ("a sleeping test",
     {"tests/core/ids_test.cc": '#include "src/core/ids.h"\n\nvoid F() { usl' "eep(1); }\n"},
     "sleep", "tests/core/ids_test.cc"),
    ("a word about sleeping",
     {"tests/core/ids_test.cc": '#include "src/core/ids.h"\n\n// Never sl' "eep() here.\n"},
     None, None),
    ("a bound CPU", {"meson.build+": "add_project_arguments('-march=native', language: 'cpp')\n"},
     "march", "meson.build"),
    ("a bound CPU of a peer", {"perf/meson.build": "args = ['-march=native']\n"}, None, None),
    ("a layout of one's own", {"index/shard.cc": '#include "index/shard.h"\n\n'
                                                 "Id Next( Id id ){return id+1;}\n"},
     "format", "index/shard.cc"),
    ("a header that leans on its user", {"index/shard.h": "#pragma once\n\nId Next(Id id);\n"},
     "header", "index/shard.h"),
)


def plant(root, changes):
    """Writes the clean tree with the changes, a git repository and a compile_commands.json."""
    files = dict(CLEAN_TREE)
    files[".clang-format"] = "BasedOnStyle: Google\nColumnLimit: 100\nReflowComments: false\n"
    for name, content in changes.items():
        name, appended = (name[:-1], True) if name.endswith("+") else (name, False)
        files[name] = files.get(name, "") + content if appended else content
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    if shutil.which("git"):
        subprocess.run(["git", "init", "-q", str(root)], check=True)
    build = root / "build"
    build.mkdir(exist_ok=True)
    sources = [name for name in files if name.endswith(".cc") and not name.startswith("build/")]
    (build / "compile_commands.json").write_text(json.dumps([
        {"directory": str(build), "file": f"../{name}", "command": f"ccache c++ -I.. -c ../{name}"}
        for name in sources]))
    (root / ".git" / "info").mkdir(parents=True, exist_ok=True)
    (root / ".git" / "info" / "exclude").write_text("/build/\n")
    return build


def run():
    missed = 0
    have = {"format": shutil.which("clang-format-19"), "header": shutil.which("c++")}
    for title, changes, rule, path in SELF_TESTS:
        if not have.get(rule, True):
            print(f"not tried, no tool for it: {title}")
            continue
        with tempfile.TemporaryDirectory() as directory:
            root = pathlib.Path(directory)
            build = plant(root, changes)
            # Only the clean tree and its own fault need a compiler: each run of it costs a second.
            headers = bool(have["header"]) and (not changes or rule == "header")
            findings, _, _ = tidy.run_checks(root, build, headers)
            if headers and rule is None:
                findings += tidy.run_checks(root, build, headers)[0]  # again, from the cache
        # The faulty trees are not laid out with care: format counts where it is the point.
        findings = [f for f in findings if f.rule != "format" or rule == "format" or not changes]
        hits = [f for f in findings if (f.rule, f.path) == (rule, path)]
        others = [f for f in findings if f not in hits]
        if (rule and not hits) or others:
            missed += 1
            print(f"FAILED: {title}: expected {rule and (rule, path)}, found {findings}")
    print(f"tidy self-test: {len(SELF_TESTS) - missed} of {len(SELF_TESTS)} as expected")
    return 1 if missed else 0
