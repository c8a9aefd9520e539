// What follows the pointer and the arrow keys, and what the browser saves. The pictures come from svg.py.
window.apet = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  // The positions of a section, parsed once for each picture that the server sends.
  const parsed = new WeakMap();
  const dataOf = (section) => {
    const text = section.dataset.view;
    let known = parsed.get(section);
    if (!known || known.text !== text) {
      known = { text, view: JSON.parse(text) };
      parsed.set(section, known);
    }
    return known.view;
  };

  const make = (name, attributes) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const centre = (view, at) => [(at % view.grid[1]) + 0.5, Math.floor(at / view.grid[1]) + 0.5];
  const square = (view, at, kind) => {
    const [x, y] = centre(view, at);
    return make("rect", { class: kind, x: x - 0.5, y: y - 0.5, width: 1, height: 1 });
  };
  const place = (view, at) => `row ${Math.floor(at / view.grid[1]) + 1}, column ${(at % view.grid[1]) + 1}`;

  const describe = (view, at) => {
    const target = view.target[at];
    const group = target < 0 ? 0 : view.target.filter((other) => other === target).length;
    const order = view.basis.indexOf(at) + 1;
    const residual = view.residual[at];
    const rank = residual === null ? 1 : view.residual.filter((other) => other === null || other > residual).length + 1;
    let fate;
    if (view.kept.includes(at) && target === at) {
      fate = group > 1 ? `kept, ${group - 1} more merged into it` : "kept, alone";
    } else if (target >= 0) {
      const others = group - 2;
      fate = `merged into ${place(view, target)}` + (others > 0 ? `, with ${others} more` : "");
    } else {
      fate = "lost";
    }
    if (order) fate += `; basis token ${order}`;
    const size = residual === null ? "not finite" : residual.toPrecision(3);
    return `${fate}; residual ${size}, ${rank} of ${view.target.length}`;
  };

  // Marks patch `at` in all pictures; null removes the marks.
  const mark = (element, at) => {
    const root = element.querySelector(".apet");
    const sections = [...element.querySelectorAll("section[data-view]")];
    if (!sections.length) return;
    const where = element.querySelector(".where");
    const said = [];
    for (const [number, section] of sections.entries()) {
      const view = dataOf(section);
      if (at !== null && at >= view.target.length) at = null;
      for (const cursor of section.querySelectorAll(".cursor")) {
        cursor.replaceChildren();
        if (at === null) continue;
        const target = view.target[at];
        if (target >= 0) {
          view.target.forEach((other, from) => other === target && cursor.append(square(view, from, "same")));
          const [x1, y1] = centre(view, at);
          const [x2, y2] = centre(view, target);
          cursor.append(make("line", { x1, y1, x2, y2 }), square(view, target, "target"));
        }
        cursor.append(square(view, at, "here"));
      }
      if (at !== null) said.push((sections.length > 1 ? "AB"[number] + ": " : "") + describe(view, at));
    }
    if (at === null) return;
    const here = place(dataOf(sections[0]), at);
    where.textContent = here[0].toUpperCase() + here.slice(1) + ": " + said.join(" · ") + ".";
    root.dataset.at = at;
  };

  const mount = (element, watch) => {
    let at = null; // the marked patch
    let held = false; // by a click or the keyboard: the pointer then leaves it alone
    const under = (event) => {
      const picture = event.target.closest?.("svg.patches");
      if (!picture) return null;
      const [rows, cols] = dataOf(picture.closest("section")).grid;
      const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
      const col = Math.min(Math.max(Math.floor(x), 0), cols - 1);
      const row = Math.min(Math.max(Math.floor(y), 0), rows - 1);
      return row * cols + col;
    };
    const go = (to) => {
      if (to !== at) mark(element, (at = to));
    };
    element.addEventListener("pointermove", (event) => {
      if (!held && event.pointerType === "mouse") go(under(event));
    });
    element.addEventListener("pointerleave", () => {
      if (!held) go(null);
    });
    element.addEventListener("click", (event) => {
      const to = under(event);
      held = to !== null && !(held && to === at);
      if (to !== null) mark(element, (at = held ? to : null));
    });
    element.addEventListener("keydown", (event) => {
      const picture = event.target.closest?.("svg.patches");
      if (!picture) return;
      if (event.key === "Escape") {
        held = false;
        return go(null);
      }
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [rows, cols] = dataOf(picture.closest("section")).grid;
      const [row, col] = at === null ? [0, -step[1]] : [Math.floor(at / cols), at % cols];
      held = true;
      const next = at === null ? [0, 0] : [row + step[0], col + step[1]];
      go(Math.min(Math.max(next[0], 0), rows - 1) * cols + Math.min(Math.max(next[1], 0), cols - 1));
    });
    // The address holds the settings that are shown; what else it holds (Gradio's own names) stays.
    watch("value", () => {
      mark(element, at);
      const query = element.querySelector(".apet")?.dataset.query;
      if (query === undefined) return;
      const names = ["method", "keep", "basis", "layout", "select", "refine"];
      const address = new URL(window.location.href);
      for (const name of [...names, ...names.map((name) => "b_" + name), "frame"]) address.searchParams.delete(name);
      for (const [name, value] of new URLSearchParams(query)) address.searchParams.set(name, value);
      window.history.replaceState(null, "", address);
    });
  };

  const download = (name, blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };

  // Saves what the server made: text as it is, a picture (SVG) as PNG of twice its size, in the colours of the page.
  const save = async (made) => {
    if (!made.name.endsWith(".png")) return download(made.name, new Blob([made.text], { type: "application/json" }));
    const svg = new DOMParser().parseFromString(made.text, "image/svg+xml").documentElement;
    svg.classList.toggle("dark", document.body.classList.contains("dark"));
    const source = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" }));
    const image = new Image();
    image.src = source;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = 2 * image.width;
    canvas.height = 2 * image.height;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    URL.revokeObjectURL(source);
    download(made.name, await new Promise((done) => canvas.toBlob(done, "image/png")));
  };

  const copy = async () => {
    let said = "The link is in the clipboard.";
    try {
      await navigator.clipboard.writeText(window.location.href);
    } catch {
      said = "This browser does not let a page copy: the address above is the link.";
    }
    const where = document.querySelector(".apet .where");
    if (where) where.textContent = said;
  };

  return { mount, save, copy };
})();
