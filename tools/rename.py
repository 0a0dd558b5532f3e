"""Rename over the syntax tree. python3.12 rename.py RULES [--dry]

Rules, a line each:
    app.desk:Desk JobContext             a module's name, and all that import it
    .report report_progress @app/**      attributes, methods, keyword arguments of that name in the files (glob after @)
    .report report_progress =app.desk:Desk @app/**   ... and only definitions in that class (uses: all in the files)
    local old new @file[:function]       a local variable or parameter, with keyword arguments at calls in the file
"""
from __future__ import annotations
import ast, re, sys, symtable, fnmatch
from pathlib import Path
ROOT = Path.cwd()
TOPS = ("odvae", "lvdm", "app", "tests", "benchmarks")
files = {p: p.read_text() for t in TOPS for p in sorted((ROOT/t).rglob("*.py"))}
def module_of(p):
    parts = list(p.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("tests", "benchmarks"): parts = parts[-1:] 
    if parts[-1] == "__init__": parts = parts[:-1]
    return ".".join(parts)
modules = {module_of(p): p for p in files}
def is_package(p): return p.name == "__init__.py"
class Edits:
    def __init__(s): s.at = {}
    def put(s, p, line, col, old, new):
        s.at.setdefault(p, {})[(line, col)] = (old, new)
def resolve(p, node):
    if not node.level: return node.module or ""
    parts = module_of(p).split(".")
    if not is_package(p): parts = parts[:-1]
    parts = parts[:len(parts) - node.level + 1]
    return ".".join(parts + ([node.module] if node.module else []))
class Scopes(ast.NodeVisitor):
    """For each Name node: is it global in the module (not a local of an enclosing function or comprehension)?"""
    def __init__(s, tree):
        s.stack = []; s.globals = []; s.attrs = []; s.keywords = []; s.tree = tree; s.visit(tree)
    def bound(s, node):
        names = set(); 
        a = node.args
        for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else [])]: names.add(x.arg)
        if isinstance(node, ast.Lambda): return names
        globs = set()
        def walk(n):
            for c in ast.iter_child_nodes(n):
                if isinstance(c, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    names.add(c.name); 
                    for d in c.decorator_list: walk(d)
                    continue
                if isinstance(c, ast.Lambda): continue
                if isinstance(c, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
                    continue
                if isinstance(c, ast.Name) and isinstance(c.ctx, (ast.Store, ast.Del)): names.add(c.id)
                if isinstance(c, (ast.Import, ast.ImportFrom)):
                    for al in c.names: names.add((al.asname or al.name).split(".")[0])
                if isinstance(c, ast.ExceptHandler) and c.name: names.add(c.name)
                if isinstance(c, (ast.MatchAs, ast.MatchStar)) and c.name: names.add(c.name)
                if isinstance(c, ast.Global): globs.update(c.names)
                walk(c)
        for b in node.body: walk(ast.Module(body=[b], type_ignores=[]))
        return names - globs
    def visit_FunctionDef(s, n):
        for d in n.decorator_list: s.visit(d)
        for x in ast.walk(n.args):
            pass
        for d in [*n.args.defaults, *[k for k in n.args.kw_defaults if k]]: s.visit(d)
        for a in [*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs, n.args.vararg, n.args.kwarg]:
            if a is not None and a.annotation is not None: s.visit(a.annotation)
        if n.returns: s.visit(n.returns)
        s.stack.append(("f", s.bound(n), n))
        for b in n.body: s.visit(b)
        s.stack.pop()
    visit_AsyncFunctionDef = visit_FunctionDef
    def visit_Lambda(s, n):
        for d in [*n.args.defaults, *[k for k in n.args.kw_defaults if k]]: s.visit(d)
        s.stack.append(("f", s.bound(n), n)); s.visit(n.body); s.stack.pop()
    def visit_ClassDef(s, n):
        for d in n.decorator_list: s.visit(d)
        for b in n.bases: s.visit(b)
        for k in n.keywords: s.visit(k.value)
        names = set()
        for b in n.body:
            if isinstance(b, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): names.add(b.name)
            for c in ast.walk(b) if not isinstance(b, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else []:
                if isinstance(c, ast.Name) and isinstance(c.ctx, ast.Store): names.add(c.id)
        s.stack.append(("c", names, n))
        for b in n.body: s.visit(b)
        s.stack.pop()
    def comp(s, n):
        names = {c.id for g in n.generators for c in ast.walk(g.target) if isinstance(c, ast.Name)}
        s.visit(n.generators[0].iter)
        s.stack.append(("f", names, n))
        for i, g in enumerate(n.generators):
            if i: s.visit(g.iter)
            for c in g.ifs: s.visit(c)
        for f in ("elt", "key", "value"):
            if hasattr(n, f): s.visit(getattr(n, f))
        s.stack.pop()
    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comp
    def visit_Name(s, n):
        top = True
        for i, (kind, names, node) in enumerate(reversed(s.stack)):
            if kind == "c" and i > 0: continue   # a class's names are not seen from its methods
            if n.id in names: top = False; break
        owner = None
        if not top:
            owner = list(reversed(s.stack))[i][2]
        s.globals.append((n, top, owner))
trees = {p: ast.parse(t) for p, t in files.items()}
LINES = {p: t.splitlines() for p, t in files.items()}
NODES = {p: list(ast.walk(t)) for p, t in trees.items()}
IMPORTS = {p: [n for n in NODES[p] if isinstance(n, (ast.ImportFrom, ast.Import))] for p in trees}
RESOLVED = {}
for _p, _ns in IMPORTS.items():
    for _n in _ns:
        if isinstance(_n, ast.ImportFrom): RESOLVED[_n] = resolve(_p, _n)
_within = {}
def within(owner):
    if owner not in _within: _within[owner] = set(ast.walk(owner))
    return _within[owner]
TOPLEVEL = {p: set(t.body) for p, t in trees.items()}
TYPECHECK = {p: {n for b in t.body if isinstance(b, (ast.If, ast.Try)) for n in ast.walk(b)} for p, t in trees.items()}
def def_position(p, node):
    lines = LINES[p]
    for l in range(node.lineno - 1, node.lineno + 3):
        m = re.search(r"\b(?:def|class)\s+(%s)\b" % re.escape(node.name), lines[l])
        if m: return l + 1, m.start(1)
    raise SystemExit(f"{p}:{node.lineno} {node.name}")
scopes = {}
def scope(p):
    if p not in scopes: scopes[p] = Scopes(trees[p])
    return scopes[p]
def col(p, line, byte): return len(LINES[p][line-1].encode()[:byte].decode())
def rename_global(mod, old, new, edits, seen=None):
    seen = seen if seen is not None else set()
    if (mod, old) in seen: return
    seen.add((mod, old))
    p = modules.get(mod)
    if p is None: raise SystemExit(f"no module {mod}")
    t = trees[p]
    defined = False
    for d in t.body:
        if isinstance(d, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and d.name == old:
            edits.put(p, *def_position(p, d), old, new); defined = True
    for n, top, _ in scope(p).globals:
        if n.id == old and top:
            edits.put(p, n.lineno, col(p, n.lineno, n.col_offset), old, new); defined = defined or isinstance(n.ctx, ast.Store)
    if len(seen) == 1 and not defined: raise SystemExit(f"{mod} does not define {old}")
    # importers
    for q, tq in trees.items():
        for n in IMPORTS[q]:
            if isinstance(n, ast.ImportFrom) and RESOLVED[n] == mod:
                for al in n.names:
                    if al.name == old:
                        edits.put(q, al.lineno, col(q, al.lineno, al.col_offset), old, new)
                        if not al.asname:
                            inner(q, n, old, new, edits)
                            # re-exported?
                            if n in TOPLEVEL[q]: rename_reexport(module_of(q), old, new, edits, seen)
            if isinstance(n, ast.ImportFrom):
                base = RESOLVED[n]
                for al in n.names:
                    if f"{base}.{al.name}" == mod or (base == "" and al.name == mod):
                        attrs_of(q, al.asname or al.name, old, new, edits)
            if isinstance(n, ast.Import):
                for al in n.names:
                    if al.name == mod: attrs_of(q, al.asname or al.name, old, new, edits)
def inner(q, imp, old, new, edits):
    for n, top, owner in scope(q).globals:
        if n.id != old: continue
        if top and imp in TOPLEVEL[q] or (not top and owner is not None and imp in within(owner)) or (top and in_type_checking(q, imp)):
            edits.put(q, n.lineno, col(q, n.lineno, n.col_offset), old, new)
        elif not top and owner is None: print("?", q, n.lineno, old)
def in_type_checking(q, imp):
    return imp in TYPECHECK[q]
def rename_reexport(mod, old, new, edits, seen):
    if (mod, old) in seen: return
    seen.add((mod, old))
    for q, tq in trees.items():
        for n in IMPORTS[q]:
            if isinstance(n, ast.ImportFrom) and RESOLVED[n] == mod:
                for al in n.names:
                    if al.name == old:
                        edits.put(q, al.lineno, col(q, al.lineno, al.col_offset), old, new)
                        if not al.asname:
                            inner(q, n, old, new, edits)
                            if n in TOPLEVEL[q]: rename_reexport(module_of(q), old, new, edits, seen)
            if isinstance(n, (ast.ImportFrom,)):
                base = RESOLVED[n]
                for al in n.names:
                    if f"{base}.{al.name}" == mod: attrs_of(q, al.asname or al.name, old, new, edits)
            if isinstance(n, ast.Import):
                for al in n.names:
                    if al.name == mod: attrs_of(q, al.asname or al.name, old, new, edits)
def attrs_of(q, name, old, new, edits):
    for n in NODES[q]:
        if isinstance(n, ast.Attribute) and n.attr == old and ast.unparse(n.value) == name:
            edits.put(q, n.end_lineno, col(q, n.end_lineno, n.end_col_offset) - len(old), old, new)
def matching(globs): 
    out = []
    for p in files:
        r = str(p.relative_to(ROOT))
        if any(fnmatch.fnmatch(r, g) for g in globs if not g.startswith("!")) and not any(fnmatch.fnmatch(r, g[1:]) for g in globs if g.startswith("!")): out.append(p)
    return out
def rename_attr(old, new, globs, cls, edits, kw=True):
    found = 0
    for p in matching(globs):
        for n in NODES[p]:
            if isinstance(n, ast.Attribute) and n.attr == old:
                edits.put(p, n.end_lineno, col(p, n.end_lineno, n.end_col_offset) - len(old), old, new); found += 1
            elif kw and isinstance(n, ast.keyword) and n.arg == old:
                edits.put(p, n.lineno, col(p, n.lineno, n.col_offset), old, new); found += 1
            elif isinstance(n, ast.ClassDef) and (not cls or n.name in cls):
                for b in n.body:
                    if isinstance(b, (ast.FunctionDef, ast.AsyncFunctionDef)) and b.name == old:
                        edits.put(p, *def_position(p, b), old, new); found += 1
                        # property setters share the name
                    elif isinstance(b, ast.AnnAssign) and isinstance(b.target, ast.Name) and b.target.id == old:
                        edits.put(p, b.target.lineno, col(p, b.target.lineno, b.target.col_offset), old, new); found += 1
                    elif isinstance(b, ast.Assign):
                        for x in b.targets:
                            if isinstance(x, ast.Name) and x.id == old:
                                edits.put(p, x.lineno, col(p, x.lineno, x.col_offset), old, new); found += 1
                    if isinstance(b, (ast.FunctionDef,)) and b.name == "__init__":
                        pass
    if not found: print("nothing:", old)
def rename_local(old, new, globs, function, edits):
    found = 0
    for p in matching(globs):
        for n in NODES[p]:
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and (not function or getattr(n, "name", "") == function):
                sc = Scopes.bound(scope(p), n)
                if old not in sc: continue
                for a in ast.walk(n):
                    if isinstance(a, ast.arg) and a.arg == old:
                        edits.put(p, a.lineno, col(p, a.lineno, a.col_offset), old, new); found += 1
                    if isinstance(a, ast.Name) and a.id == old:
                        edits.put(p, a.lineno, col(p, a.lineno, a.col_offset), old, new); found += 1
        if function:
            for q in files:
                for n in NODES[q]:
                    if isinstance(n, ast.Call) and (getattr(n.func, "id", getattr(n.func, "attr", "")) == function):
                        for k in n.keywords:
                            if k.arg == old: edits.put(q, k.lineno, col(q, k.lineno, k.col_offset), old, new)
    if not found: print("no local:", old, globs, function)
def main():
    dry = "--dry" in sys.argv
    edits = Edits(); strings = []
    for raw in Path(sys.argv[1]).read_text().splitlines():
        line = raw.split("#")[0].split()
        if not line: continue
        globs = [w[1:] for w in line if w.startswith("@")] or ["*"]
        cls = [w[1:] for w in line if w.startswith("=")]
        words = [w for w in line if w[0] not in "@="]
        if words[0] == "local":
            g = [x.split(":")[0] for x in globs]; fn = next((x.split(":")[1] for x in globs if ":" in x), "")
            rename_local(words[1], words[2], g, fn, edits)
        elif words[0].startswith("."):
            rename_attr(words[0][1:], words[1], globs, cls, edits, "nokw" not in words)
        else:
            mod, old = words[0].split(":"); rename_global(mod, old, words[1], edits); strings.append((f"{mod}.{old}", f"{mod}.{words[1]}")); strings.append((f'"{old}": "', f'"{words[1]}": "'))
    total = 0
    for p, at in edits.at.items():
        lines = files[p].splitlines(keepends=True)
        for (l, c), (old, new) in sorted(at.items(), reverse=True):
            s = lines[l-1]
            if s[c:c+len(old)] != old: print("MISMATCH", p, l, c, old, repr(s[c:c+20])); continue
            lines[l-1] = s[:c] + new + s[c+len(old):]; total += 1
        text = "".join(lines)
        if not dry: p.write_text(text)
    if not dry:
        for p in files:
            t = p.read_text(); u = t
            for a, b in strings:
                if a.startswith('"') and "_HOME" not in t and "__all__" not in t: continue
                u = re.sub(r"(?<![\w.])" + re.escape(a) + r"(?!\w)" if not a.startswith('"') else re.escape(a), b, u)
                if a.startswith('"'):
                    o, nn = a[1:].split('"')[0], b[1:].split('"')[0]
                    u = re.sub(r'(__all__ = \[[^\]]*)"%s"' % re.escape(o), r'\1"%s"' % nn, u)
            if u != t: p.write_text(u)
    print(total, "edits in", len(edits.at), "files")
main()
