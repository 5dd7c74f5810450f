// The status page: polls /page.json and shows it. Names come from elsewhere, so text is only ever set as text.
"use strict";

const POLL_MS = 1000;
const PATIENCE_MS = 5000;
const STEPS = 150;
const SVG = "http://www.w3.org/2000/svg";

const STATES = {
  unprotected: ["idle", "Runs by itself; nobody stands by."],
  pairing: ["busy", "Standby and witness are being asked."],
  syncing: ["busy", "The first copy is under way; until it ends a failure of this host would lose the VM."],
  protected: ["good", "Would go on elsewhere if this host died now."],
  degraded: ["warn", "Runs, but would be lost with this host."],
  "failing-over": ["warn", "Ownership is changing hands."],
  fenced: ["idle", "Another copy owns the VM; this one is mute and stands, or is gone."],
  error: ["bad", "Stopped by an error that needs an operator."],
};
const TROUBLE = ["degraded", "failing-over", "error"];
// What needs somebody comes first.
const ORDER = ["bad", "warn", "busy"];
const LONG = ["First copy", "Last failover to here"];

const byId = (id) => document.getElementById(id);

function el(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function svg(tag, className) {
  const element = document.createElementNS(SVG, tag);
  element.setAttribute("class", className);
  return element;
}

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1) return `${ms.toFixed(2)} ms`;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${ms.toFixed(0)} ms`;
  if (ms < 60000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 5400000) return `${Math.round(ms / 60000)} min`;
  if (ms < 129600000) return `${Math.round(ms / 3600000)} h`;
  return `${Math.round(ms / 86400000)} days`;
}

function clock(date) {
  return date.toLocaleTimeString([], { hourCycle: "h23" });
}

function bytes(count) {
  if (count < 1024) return `${count} B`;
  if (count < 1048576) return `${(count / 1024).toFixed(1)} KiB`;
  return `${(count / 1048576).toFixed(1)} MiB`;
}

// 1, 2 or 5 times a power of ten, not below `value`.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 0.01)));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

const grouped = (count) => count.toLocaleString("en");
const largest = (values) => values.reduce((most, value) => (value > most ? value : most), 0);
const last = (values) => values.findLast((value) => value !== null);

// One series over the last steps, the newest at the right.
class Plot {
  constructor(kind, title) {
    this.values = [];
    this.title = title;
    this.root = el("figure", kind);
    this.caption = el("span", "", title);
    this.readout = el("output", "soft");
    const caption = el("figcaption");
    caption.append(this.caption, this.readout);
    this.area = svg("path", "area");
    this.curve = svg("path", "curve");
    this.cursor = svg("path", "cursor");
    const drawing = svg("svg", "");
    drawing.setAttribute("viewBox", `0 0 ${STEPS} 100`);
    drawing.setAttribute("preserveAspectRatio", "none");
    drawing.setAttribute("role", "img");
    drawing.setAttribute("aria-label", `${title} over the last five minutes`);
    drawing.append(this.area, this.curve, this.cursor);
    this.top = el("span", "top");
    this.plot = el("div", "plot");
    this.plot.append(drawing, this.top);
    const times = el("div", "times");
    times.append(el("span", "", "5 min ago"), el("span", "", "now"));
    this.root.append(caption, this.plot, times);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.point(null));
  }

  show(values, stepMs) {
    this.values = values;
    this.stepMs = stepMs;
    const most = largest(values);
    const top = roundUp(most);
    const x = (index) => STEPS - values.length + index + 0.5;
    const y = (value) => (100 - (value / top) * 96).toFixed(1);
    let curve = "";
    let area = "";
    let from = null;
    values.forEach((value, index) => {
      if (value === null) return;
      if (from === null) from = index;
      const begins = from === index;
      curve += `${begins ? "M" : "L"}${x(index)} ${y(value)}`;
      area += `${begins ? `M${x(index)} 100L` : "L"}${x(index)} ${y(value)}`;
      if (index + 1 === values.length || values[index + 1] === null) {
        if (begins) curve += "h0.01";
        area += `L${x(index)} 100Z`;
        from = null;
      }
    });
    this.curve.setAttribute("d", curve);
    this.area.setAttribute("d", area);
    put(this.top, most > 0 ? duration(top) : "");
    put(this.caption, `${this.title}: ${duration(last(values))}`);
    if (!this.pointed) put(this.readout, most > 0 ? `at most ${duration(most)}` : "nothing yet");
  }

  point(event) {
    this.pointed = false;
    this.cursor.style.visibility = "hidden";
    if (!event) return;
    const box = this.plot.getBoundingClientRect();
    const step = Math.floor(((event.clientX - box.left) / box.width) * STEPS);
    const index = step - STEPS + this.values.length;
    const value = this.values[index];
    if (value === undefined) return;
    this.pointed = true;
    this.cursor.style.visibility = "visible";
    this.cursor.setAttribute("d", `M${step + 0.5} 0V100`);
    const ago = (this.values.length - index) * this.stepMs;
    put(this.readout, `${duration(ago)} ago: ${value === null ? "nothing" : duration(value)}`);
  }
}

// One VM. Made once and changed in place, so that a selection or a pointer in it survives.
class Card {
  constructor(name) {
    this.root = el("article", "vm");
    this.state = el("span", "state");
    const head = el("h2");
    head.append(el("span", "name", name), this.state);
    this.means = el("p", "means");
    this.progress = el("progress");
    this.facts = el("dl");
    this.fields = new Map();
    this.pause = new Plot("pause", "Pause");
    this.lag = new Plot("lag", "Replication lag");
    this.plots = el("div", "plots");
    this.plots.append(this.pause.root, this.lag.root);
    this.root.append(head, this.means, this.progress, this.facts, this.plots);
  }

  fact(title, text) {
    let field = this.fields.get(title);
    if (!field) {
      field = el("div", LONG.includes(title) ? "long" : "");
      field.append(el("dt", "", title), el("dd"));
      this.fields.set(title, field);
      this.facts.append(field);
    }
    field.hidden = text === null;
    put(field.lastChild, text === null ? "" : text);
  }

  show(vm, page) {
    const [look, means] = STATES[vm.state] || ["idle", ""];
    const standby = vm.role === "standby";
    this.state.className = `state ${look}`;
    put(this.state, vm.state);
    let text = means;
    if (vm.state === "protected" && standby) text = "This host holds a whole copy and goes on with it if the other one dies.";
    if (TROUBLE.includes(vm.state)) text += ` “understudy status ${vm.name}” on this host says why and what to do.`;
    put(this.means, text);
    const sync = vm.sync;
    this.progress.hidden = !sync;
    if (sync) {
      this.progress.max = Math.max(sync.total_pages, 1);
      this.progress.value = sync.done_pages;
    }
    this.fact("Role", vm.role);
    this.fact("Peer", vm.peer || "–");
    this.fact("Generation", String(vm.generation));
    this.fact("Epoch committed", standby ? null : grouped(vm.epoch_committed));
    this.fact("Epoch held", standby ? grouped(vm.epoch_committed) : null);
    this.fact("First copy", sync ? `${grouped(sync.done_pages)} of ${grouped(sync.total_pages)} pages, round ${sync.round}` : null);
    const runs = !standby && vm.epochs_per_s > 0;
    this.fact("Epochs", runs ? `${vm.epochs_per_s.toFixed(1)} per second` : null);
    this.fact("Guest paused", runs ? `${(vm.pause_share * 100).toFixed(1)} % of the time` : null);
    const held = `${vm.held_frames} frames, ${bytes(vm.held_bytes)}`;
    this.fact("Output held", standby ? null : vm.held_frames > 0 ? `${held}, ${duration(vm.held_oldest_ms)}` : "none");
    const failover = vm.failover;
    this.fact(
      "Last failover to here",
      failover
        ? `${duration(page.unix_ms - failover.unix_ms)} ago: ${failover.cause}; detection ${duration(failover.detection_ms)}, activation ${duration(failover.activation_ms)}`
        : null,
    );
    this.plots.hidden = !vm.pause_ms.some((value) => value !== null) && !vm.lag_ms.some((value) => value !== null);
    this.pause.show(vm.pause_ms, page.step_ms);
    this.lag.show(vm.lag_ms, page.step_ms);
  }
}

function sums(page) {
  const running = page.vms.filter((vm) => vm.role !== "standby" && vm.state !== "fenced");
  const safe = running.filter((vm) => vm.state === "protected").length;
  const risk = running.length - safe;
  const standbys = page.vms.filter((vm) => vm.role === "standby");
  const ready = standbys.filter((vm) => vm.state === "protected").length;
  const failovers = page.vms.reduce((sum, vm) => sum + vm.failovers, 0);
  const lost = page.witnesses.filter((witness) => !witness.reachable).length;
  const witness = page.witnesses.length === 0 ? "none" : lost > 0 ? "silent" : "answers";
  const all = [
    ["VMs run here", String(running.length), ""],
    ["protected", String(safe), safe > 0 ? "good" : ""],
    ["at risk", String(risk), risk > 0 ? "bad" : ""],
    ["copies stand by", standbys.length === ready ? String(ready) : `${ready} of ${standbys.length}`, ""],
    ["failovers to here", String(failovers), ""],
    ["witness", witness, page.witnesses.length > 0 && lost > 0 ? "bad" : ""],
  ];
  byId("sums").replaceChildren(
    ...all.map(([title, value, look]) => {
      const item = el("li", look);
      item.append(el("b", "", value), title);
      return item;
    }),
  );
}

const cards = new Map();

function vms(page) {
  const main = byId("vms");
  const names = new Set(page.vms.map((vm) => vm.name));
  for (const [name, card] of cards) {
    if (!names.has(name)) {
      card.root.remove();
      cards.delete(name);
    }
  }
  const rank = (vm) => {
    const place = ORDER.indexOf((STATES[vm.state] || [""])[0]);
    return place < 0 ? ORDER.length : place;
  };
  const ordered = page.vms.toSorted((one, other) => rank(one) - rank(other));
  ordered.forEach((vm, index) => {
    if (!cards.has(vm.name)) cards.set(vm.name, new Card(vm.name));
    const card = cards.get(vm.name);
    if (main.children[index] !== card.root) main.insertBefore(card.root, main.children[index] || null);
    card.show(vm, page);
  });
  let empty = byId("empty");
  if (page.vms.length > 0) {
    if (empty) empty.remove();
  } else if (!empty) {
    empty = el("p", "notice", "No VM is known here. Protect one with “understudy protect VM --to HOST”.");
    empty.id = "empty";
    main.append(empty);
  }
}

function events(page) {
  const items = page.events.map((event) => {
    const item = el("li");
    const time = el("time", "soft", clock(new Date(event.unix_ms)));
    time.dateTime = new Date(event.unix_ms).toISOString();
    time.title = new Date(event.unix_ms).toLocaleString();
    item.append(time, el("span", `e-${event.kind}`, `${event.vm}: ${event.text}`));
    return item;
  });
  if (items.length === 0) items.push(el("li", "soft", "none yet"));
  byId("events").replaceChildren(...items);
}

function peers(page) {
  const row = (...cells) => {
    const line = el("tr");
    line.append(...cells.map(([text, look]) => el("td", look, text)));
    return line;
  };
  const rows = page.peers.map((peer) =>
    row(
      [peer.name],
      [`${duration(peer.silence_ms)} ago`, peer.silence_ms > 1000 ? "bad" : ""],
      [peer.rtt_ms > 0 ? duration(peer.rtt_ms) : "–"],
      [peer.phi < 10 ? peer.phi.toFixed(1) : String(Math.round(peer.phi)), peer.phi >= 8 ? "bad" : ""],
    ),
  );
  const witnesses = page.witnesses.map((witness) =>
    row([witness.name === "witness" ? "witness" : `${witness.name} (witness)`], [witness.reachable ? "answers" : "silent", witness.reachable ? "" : "bad"], ["–"], ["–"]),
  );
  byId("peers").replaceChildren(...rows, ...witnesses);
}

let shownEvents = "";
let answered = null;

function show(page) {
  document.title = `${page.agent} – Understudy`;
  put(byId("agent"), page.agent);
  put(byId("version"), `Understudy ${page.version}`);
  put(byId("since"), `${duration(page.unix_ms - page.since_unix_ms)} ago`);
  sums(page);
  vms(page);
  peers(page);
  // Made again only when there are others: a selection in them survives.
  const now = JSON.stringify(page.events);
  if (now !== shownEvents) events(page);
  shownEvents = now;
}

function live(good, text) {
  byId("live").className = good ? "good" : "bad";
  put(byId("live"), text);
  document.body.classList.toggle("stale", !good);
}

async function poll() {
  try {
    if (!document.hidden) {
      const answer = await fetch("/page.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      show(await answer.json());
      answered = new Date();
      live(true, "live");
    }
  } catch {
    live(false, answered ? `the agent does not answer; this is from ${clock(answered)}` : "the agent does not answer");
  }
  setTimeout(poll, POLL_MS);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  if (answered && Date.now() - answered > PATIENCE_MS) live(false, `asking the agent; this is from ${clock(answered)}`);
});
poll();
