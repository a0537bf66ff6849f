"use strict";
// Text from runs only ever becomes text nodes: nothing here writes HTML.
(() => {
  const at = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  function make(tag, name, ...children) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  function figure(value) {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (size >= 1e12) return (value / 1e12).toPrecision(3) + "T";
    if (size >= 1e9) return (value / 1e9).toPrecision(3) + "G";
    if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
    if (size >= 1e4) return (value / 1e3).toPrecision(3) + "k";
    return String(Number(value.toPrecision(3)));
  }

  // Samples ------------------------------------------------------------------------------------------------------
  function samples() {
    const controls = at("controls");
    if (!controls) return;
    const { runs, texts, rows } = JSON.parse(at("samples-data").textContent);
    const text = (index) => (index === null ? null : texts[index]);
    const ALL = -1;
    const seen = new Map(); // what each prompt was sampled at: steps and runs
    rows.forEach((row) => {
      const places = seen.get(row.prompt_id) || { steps: new Set(), runs: new Set() };
      places.steps.add(row.step);
      places.runs.add(row.run);
      seen.set(row.prompt_id, places);
    });
    const shared = [...seen.values()].some((places) => places.runs.size > 1);
    const state = { run: shared ? ALL : 0, step: null, filter: "", domain: "", order: "recorded", follow: "" };
    const MOST = 40;

    const ofRun = (row) => state.run === ALL || row.run === state.run;
    const steps = () => [...new Set(rows.filter(ofRun).map((row) => row.step))].sort((a, b) => a - b);
    const worth = (row) => (row.reward !== null ? row.reward : row.score !== null ? row.score - (row.teacher_score || 0) : 0);
    const orders = {
      best: (a, b) => worth(b) - worth(a),
      worst: (a, b) => worth(a) - worth(b),
      longest: (a, b) => (b.tokens || b.text.length) - (a.tokens || a.text.length),
    };

    function lastCommon(known) {
      const sharing = (step) => new Set(rows.filter((row) => ofRun(row) && row.step === step).map((row) => row.run)).size;
      const most = Math.max(...known.map(sharing));
      return known.filter((step) => sharing(step) === most).pop();
    }

    function chosen() {
      const wanted = state.filter.trim().toLowerCase();
      const found = rows.filter((row) =>
        ofRun(row)
        && (state.follow ? row.prompt_id === state.follow : row.step === state.step)
        && (!state.domain || row.domain === state.domain)
        && (!wanted || row.prompt_id.toLowerCase().includes(wanted) || (text(row.prompt) || "").toLowerCase().includes(wanted)));
      if (orders[state.order]) found.sort(orders[state.order]);
      const cards = new Map(); // one a step and prompt: the samples of a group, and the runs' answers, belong together
      found.forEach((row) => {
        const key = JSON.stringify([row.step, row.prompt_id]);
        cards.set(key, [...(cards.get(key) || []), row]);
      });
      if (state.follow) return [...cards.values()].sort((a, b) => a[0].step - b[0].step);
      return [...cards.values()];
    }

    function heat(row) {
      const body = make("div", "text");
      row.pieces.forEach((piece, i) => {
        const nats = row.kl[i];
        const level = nats === null ? 0 : [0.05, 0.2, 0.5, 1, 2].filter((edge) => nats >= edge).length;
        const span = make("span", level ? "k" + level : "", piece);
        if (nats !== null) span.title = nats + " nats";
        body.append(span);
      });
      return body;
    }

    function plain(value) {
      const body = make("div", value ? "text" : "text empty", value || "(empty)");
      body.dir = "auto";
      return body;
    }

    function scale() {
      const bar = make("p", "heat", "warmer: likelier to the student than to the teacher, by nats: ");
      ["0.05", "0.2", "0.5", "1", "2"].forEach((edge, i) => bar.append(make("span", "k" + (i + 1), edge)));
      return bar;
    }

    function judged(row) {
      if (row.score === null || row.teacher_score === null) return null;
      const share = 1 / (1 + Math.exp(row.score - row.teacher_score));
      const bar = document.createElementNS(SVG, "svg");
      bar.setAttribute("viewBox", "0 0 100 6");
      bar.setAttribute("preserveAspectRatio", "none");
      [["c0", 0, 1 - share], ["c1", 1 - share, share]].forEach(([colour, from, wide]) => {
        const part = document.createElementNS(SVG, "rect");
        part.setAttribute("class", colour);
        part.setAttribute("x", (from * 100).toFixed(1));
        part.setAttribute("width", (wide * 100).toFixed(1));
        part.setAttribute("height", "6");
        bar.append(part);
      });
      const lead = share >= 0.5 ? "teacher" : "student";
      const percent = Math.round(100 * Math.max(share, 1 - share));
      return make("p", "judged", bar, `critic prefers the ${lead}, ${percent} % (margin ${figure(row.teacher_score - row.score)})`);
    }

    function said(kind, title, facts, ...body) {
      const head = make("h4", "", title);
      facts.filter(Boolean).forEach((fact) => head.append(fact instanceof Node ? fact : make("span", "", fact)));
      return make("div", "said " + kind, head, ...body);
    }

    function answered(row) {
      const finish = row.finish === "length" ? make("span", "cut", "cut at the limit") : row.finish === "given" ? "" : row.finish;
      const speaker = row.speaker || "student";
      const name = state.run !== ALL ? speaker : runs[row.run] + (speaker === "student" ? "" : `: ${speaker}`);
      const kind = state.run === ALL ? "s" + (row.run % 6) : row.speaker === "teacher" ? "teacher" : "student";
      return said(kind, name, [
        row.tokens !== null && `${row.tokens} tokens`, finish,
        row.reward !== null && `reward ${figure(row.reward)}`, row.score !== null && `score ${figure(row.score)}`,
      ], row.kl ? heat(row) : plain(text(row.text)), judged(row));
    }

    function card(group) {
      const row = group[0];
      const place = make("p", "place", [`step ${row.step}`, row.stage, row.domain].filter(Boolean).join(" · "), make("code", "", row.prompt_id));
      if (state.follow || seen.get(row.prompt_id).steps.size > 1) {
        const follow = make("button", "follow", state.follow ? "back to one step" : "follow this prompt");
        follow.type = "button";
        follow.addEventListener("click", () => { state.follow = state.follow ? "" : row.prompt_id; redraw(); });
        place.append(follow);
      }
      const prompt = make("div", "prompt", text(row.prompt) || "");
      prompt.dir = "auto";
      const columns = [...new Set(group.map((each) => each.run))].map((run) =>
        make("div", "column", ...group.filter((each) => each.run === run).map(answered)));
      const known = group.find((each) => each.teacher_text !== null && each.teacher_text !== each.text);
      const teacher = known ? make("div", "column", said("teacher", "teacher", [
        columns.length === 1 && known.teacher_score !== null && `score ${figure(known.teacher_score)}`,
      ], plain(text(known.teacher_text)))) : null;
      return make("article", "card", place, prompt, make("div", "pair", ...columns, teacher));
    }

    function options(select, values, named) {
      select.replaceChildren(...values.map((value, i) => {
        const option = make("option", "", named[i]);
        option.value = value;
        return option;
      }));
    }

    function draw() {
      const known = steps();
      if (!known.includes(state.step)) state.step = lastCommon(known);
      const slider = at("step");
      slider.max = String(Math.max(0, known.length - 1));
      slider.value = String(known.indexOf(state.step));
      slider.setAttribute("aria-valuetext", `step ${state.step}`);
      slider.disabled = at("earlier").disabled = at("later").disabled = Boolean(state.follow) || known.length < 2;
      at("step-shown").textContent = state.follow ? "all, for one prompt" : String(state.step);
      const found = chosen();
      const warm = found.some((group) => group.some((row) => row.kl));
      at("cards").replaceChildren(...(warm ? [scale()] : []), ...found.slice(0, MOST).map(card));
      const where = state.follow ? "of this prompt" : `at step ${state.step}`;
      const total = found.reduce((sum, group) => sum + group.length, 0);
      at("count").textContent = `${total} ${total === 1 ? "sample" : "samples"} ${where}`
        + (found.length > MOST ? `, the first ${MOST} prompts shown` : "") + (found.length ? "" : ": widen the filter or move the step");
    }

    function redraw() {
      draw();
      const place = new URLSearchParams({ run: state.run, step: state.step });
      if (state.follow) place.set("prompt", state.follow);
      try {
        history.replaceState(null, "", "#samples?" + place);
      } catch {
        // A page inside a mail or a preview frame has no address to keep; nothing else depends on it.
      }
    }

    function move(by) {
      const known = steps();
      state.step = known[Math.min(known.length - 1, Math.max(0, known.indexOf(state.step) + by))];
      redraw();
    }

    const domains = [...new Set(rows.map((row) => row.domain).filter(Boolean))].sort();
    options(at("run"), [ALL, ...runs.keys()], ["all, side by side", ...runs]);
    at("run").value = String(state.run);
    options(at("domain"), ["", ...domains], ["all", ...domains]);
    at("run-field").hidden = runs.length < 2;
    at("domain-field").hidden = domains.length < 2;
    at("run").addEventListener("change", () => { state.run = Number(at("run").value); state.follow = ""; redraw(); });
    at("step").addEventListener("input", () => { state.step = steps()[Number(at("step").value)]; redraw(); });
    at("earlier").addEventListener("click", () => move(-1));
    at("later").addEventListener("click", () => move(1));
    at("filter").addEventListener("input", () => { state.filter = at("filter").value; redraw(); });
    at("domain").addEventListener("change", () => { state.domain = at("domain").value; redraw(); });
    at("order").addEventListener("change", () => { state.order = at("order").value; redraw(); });
    controls.addEventListener("submit", (event) => event.preventDefault());
    const linked = location.hash.startsWith("#samples?") ? new URLSearchParams(location.hash.slice(9)) : null;
    if (linked) {
      state.run = Math.min(runs.length - 1, Math.max(runs.length > 1 ? ALL : 0, Number(linked.get("run")) || 0));
      state.step = Number(linked.get("step"));
      state.follow = linked.get("prompt") || "";
      at("run").value = String(state.run);
    }
    controls.hidden = false;
    draw();
    if (linked) at("samples").scrollIntoView();
  }

  // Reading values off the charts ----------------------------------------------------------------------------------
  function readouts() {
    const readout = at("readout");
    const numbers = (value) => value.split(" ").map(Number);

    function values(chart, x) {
      const [left, right, top, bottom] = numbers(chart.dataset.box);
      const [first, last] = numbers(chart.dataset.x);
      const [low, high] = numbers(chart.dataset.y).map((v) => (chart.dataset.log === "1" ? Math.log10(v) : v));
      const curves = [...chart.querySelectorAll(".line[data-name]")].map((line) => {
        const points = line.getAttribute("d").slice(1).split("L").map(numbers);
        const near = points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
        const level = low + ((bottom - near[1]) / (bottom - top)) * (high - low);
        const value = chart.dataset.log === "1" ? 10 ** level : level;
        return { line, x: near[0], value: chart.dataset.percent === "1" ? figure(value * 100) + " %" : figure(value) };
      });
      const nearest = curves.reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a));
      const step = first + ((nearest.x - left) / (right - left)) * (last - first);
      const places = chart.dataset.places ? chart.dataset.places.split("|") : [];
      const where = places.length ? `from token ${places[Math.round(step)]}` : `step ${Math.round(step)}`;
      return { curves, x: nearest.x, where };
    }

    function key(line) {
      const icon = document.createElementNS(SVG, "svg");
      icon.setAttribute("class", "swatch");
      icon.setAttribute("viewBox", "0 0 22 8");
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", line.getAttribute("class"));
      path.setAttribute("d", "M1 4H21");
      icon.append(path);
      return icon;
    }

    function show(chart, event) {
      const box = chart.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      const found = values(chart, x);
      const hair = chart.querySelector(".hair");
      hair.setAttribute("x1", found.x);
      hair.setAttribute("x2", found.x);
      readout.replaceChildren(make("div", "quiet", found.where), ...found.curves.map(({ line, value }) =>
        make("div", "", make("span", "", key(line), " ", line.dataset.name), make("b", "", value))));
      readout.hidden = false;
      const wide = readout.offsetWidth;
      readout.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - wide - 8)) + "px";
      readout.style.top = Math.max(4, event.clientY - readout.offsetHeight - 12) + "px";
    }

    document.querySelectorAll("svg.chart[data-x]").forEach((chart) => {
      chart.addEventListener("pointermove", (event) => show(chart, event));
      chart.addEventListener("pointerdown", (event) => show(chart, event));
      chart.addEventListener("pointerleave", () => {
        readout.hidden = true;
        chart.querySelector(".hair").setAttribute("x1", -9);
        chart.querySelector(".hair").setAttribute("x2", -9);
      });
    });
  }

  samples();
  readouts();
})();
