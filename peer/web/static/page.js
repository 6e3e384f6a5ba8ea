"use strict";
// The page knows nothing of the run but what /events tells it. Whatever is shown is set as text, never as HTML.

const ROUNDS_KEPT = 1000;
const ROUNDS_LISTED = 25;
const MAP_CELL = 13;
const REASONS = {
  null: ["no quorum", "the deadline came before enough packets, and nothing changed"],
  rollback: ["rollback", "the operator took the run back to an earlier state"],
  complete: ["all delivered", "every peer that was there has delivered"],
  grace: ["grace over", "a quorum had delivered, and the time for the others was over"],
  deadline: ["deadline", "the deadline came with a quorum, but not with everybody"],
};
const MARKS = { a: "accepted", l: "late", r: "refused", "-": "absent" };
const state = { run: null, now: null, rounds: new Map(), losses: new Map(), peers: [], mapped: [], heard: 0 };
const byId = (id) => document.getElementById(id);

function say(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, { text, title, kind } = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (title) element.title = title;
  if (kind) element.className = kind;
  element.append(...children);
  return element;
}

const short = (hex) => hex.slice(0, 12);
const whole = (value) => value.toLocaleString("en");

function size(bytes) {
  if (!bytes) return "–";
  for (const [scale, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) if (bytes >= scale) return `${Number((bytes / scale).toPrecision(3))} ${unit}`;
  return `${bytes} B`;
}

function span(seconds) {
  const left = Math.max(0, Math.round(seconds));
  const [hours, minutes, rest] = [Math.floor(left / 3600), Math.floor(left / 60) % 60, left % 60];
  const two = (value) => String(value).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

const bitsOf = (loss) => (state.now && state.now.bytes_per_token ? loss / Math.LN2 / state.now.bytes_per_token : null);
const serverTime = () => state.now.time_ms + (performance.now() - state.heard);

// What the charts show

const limit = (name) => () => state.run[name];
const CHARTS = {
  loss: {
    legend: null,
    series: [{ label: "loss", colour: "blue", points: true, said: (loss) => `${loss.toFixed(3)} nats a token${bitsOf(loss) ? `\n${bitsOf(loss).toFixed(3)} bits a byte` : ""}` }],
    options: { right: () => bitsOf(1) },
  },
  packets: {
    // Bars lie over each other, so each one is as high as what it covers and its own.
    series: [
      { label: "refused", colour: "red", bars: true, values: (round) => round.accepted + round.late + round.refused, said: (_, index) => whole(shown[index].refused) },
      { label: "late", colour: "amber", bars: true, values: (round) => round.accepted + round.late, said: (_, index) => whole(shown[index].late) },
      { label: "accepted", colour: "green", bars: true, values: (round) => round.accepted, said: (_, index) => whole(shown[index].accepted) },
      { label: "quorum", colour: "quiet", dashed: true, values: limit("quorum") },
    ],
    options: { min: 0, whole: true, format: whole },
  },
  bytes: {
    series: [
      { label: "largest packet", colour: "blue", values: (round) => round.packet_bytes || null, said: size },
      { label: "its limit", colour: "blue", dashed: true, values: limit("packet_bytes_max"), said: size },
      { label: "download", colour: "violet", values: (round) => round.download_bytes || null, said: size },
      { label: "its limit", colour: "violet", dashed: true, values: limit("download_bytes_max"), said: size },
    ],
    options: { log: true, format: size },
  },
  seconds: {
    series: [{ label: "seconds", colour: "blue", values: (round) => round.seconds, said: (value) => value.toFixed(1) }],
    options: { min: 0 },
  },
};
const charts = {};
let shown = []; // the rounds of the charts, in order

function drawCharts() {
  shown = [...state.rounds.values()].sort((left, right) => left.round - right.round);
  const losses = [...state.losses].sort((left, right) => left[0] - right[0]);
  for (const [name, chart] of Object.entries(CHARTS)) {
    charts[name] ||= new Chart(`chart-${name}`, { series: chart.series, ...chart.options });
    if (name === "loss") {
      if (losses.length) charts.loss.show([losses.map(([round]) => round), losses.map(([, loss]) => loss)]);
    } else if (shown.length) {
      charts[name].show([shown.map((round) => round.round), ...chart.series.map((series) => shown.map(series.values))]);
    }
  }
}

function drawLegends() {
  for (const [name, chart] of Object.entries(CHARTS)) {
    if (name === "loss") continue;
    const items = chart.series.map((series) => make("span", {}, make("i", { kind: `swatch ${series.colour === "quiet" ? "" : series.colour} ${series.dashed ? "dashed" : ""}` }), ` ${series.label}`));
    byId(`${name}-legend`).replaceChildren(...items);
  }
}

// What is said in words

function showNow() {
  const { now, run } = state;
  say("round", `${whole(now.head)}`);
  say("round-note", `of ${whole(run.rounds)}${now.epoch ? `, epoch ${now.epoch}` : ""}`);
  const newest = now.newest;
  say("loss", newest ? newest.loss.toFixed(3) : "–");
  say("loss-note", newest ? `nats a token, after round ${newest.round}` : "not measured yet");
  say("bits", newest && newest.bits_per_byte !== null ? newest.bits_per_byte.toFixed(3) : "–");
  say("bits-note", newest && newest.perplexity !== null ? `perplexity ${compact(newest.perplexity)}` : "");
  const last = state.rounds.get(now.head);
  say("peers", last ? whole(last.accepted) : "0");
  say("peers-note", now.leading ? `${whole(now.connected)} connected, quorum ${run.quorum}` : `quorum ${run.quorum}`);
  say("tokens", compact(now.tokens));
  say("tokens-note", last ? `${compact(last.tokens)} in the last round` : "");
  say("bytes", last ? size(last.packet_bytes) : "–");
  say("bytes-note", `at most ${size(run.packet_bytes_max)}`);
  const lowest = now.lowest;
  say("loss-legend", `nats a token${now.bytes_per_token ? ", bits a byte on the right" : ""}${lowest !== null ? `; lowest ${lowest.toFixed(3)}` : ""}`);
  const alarms = now.alarms.map((alarm) => make("p", { kind: "alarm" }, make("b", { text: alarm.name.replace("_", " ") }), ` ${alarm.text}`));
  byId("alarms").replaceChildren(...alarms);
  byId("alarms").hidden = !alarms.length;
  byId("receipts").replaceChildren(...now.receipts.map(([peer, at_ms, tokens]) => make("li", { title: `${peer}\n${whole(tokens)} tokens`, text: `${short(peer)} ${span((at_ms - now.closed_ms) / 1000)}`, kind: "root" })));
  tick();
}

// What changes with the clock alone.
function tick() {
  const { now } = state;
  if (!now || !state.run) return;
  const ago = span((serverTime() - now.closed_ms) / 1000);
  const next = now.head + 1;
  const count = `${now.receipts.length} ${now.receipts.length === 1 ? "receipt" : "receipts"}`;
  if (now.complete) say("open", "The run is complete.");
  else if (now.paused) say("open", `The operator holds round ${next}.`);
  else if (now.leading && now.open_round === null) say("open", `Round ${next} is being merged.`);
  else if (now.leading && !now.connected && !now.receipts.length) say("open", `Round ${next} waits for peers; the last one closed ${ago} ago.`);
  else if (now.leading) say("open", `Round ${now.open_round}: ${count}; it closes in ${span(now.closes_in_s - (performance.now() - state.heard) / 1000)} at the latest.`);
  else say("open", `Round ${next}: ${count} here; the last round closed ${ago} ago.`);
}

function showRun() {
  const { run } = state;
  document.title = `${run.name} – sparseloco-peer`;
  say("name", run.name);
  say("about", `${compact(run.parameters)} parameters · run ${short(run.run_id)} · sparseloco-peer ${run.version}`);
  const identity = [["run id", run.run_id], ["operator", run.operator], ...run.aggregators.map((key) => ["aggregator", key])];
  byId("identity").replaceChildren(...identity.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value, kind: "root" })]));
  const tables = run.settings.map(([name, rows]) => {
    const lines = rows.map(([key, value, first]) => {
      const changed = value !== first;
      return make("tr", { kind: changed ? "changed" : "" }, make("th", { text: key }), make("td", { text: changed ? `${value} (was ${first})` : value }));
    });
    return make("div", {}, make("h3", { text: name }), make("table", {}, make("tbody", {}, ...lines)));
  });
  byId("settings").replaceChildren(...tables);
  byId("amendments").hidden = !run.amendments.length;
  byId("amendment-table").tBodies[0].replaceChildren(...run.amendments.map((item) => make("tr", {}, make("td", { text: whole(item.round) }), make("td", { text: item.text, kind: "text wrap" }))));
}

function showRounds() {
  const newest = [...state.rounds.values()].sort((left, right) => right.round - left.round).slice(0, ROUNDS_LISTED);
  const rows = newest.map((round) => {
    const [reason, why] = REASONS[round.kind] || REASONS[round.reason] || [round.reason, ""];
    const extra = [round.late ? `${round.late} late` : "", round.refused ? `${round.refused} refused` : ""].filter(Boolean).join(", ");
    const loss = state.losses.get(round.round);
    return make("tr", { kind: round.kind },
      make("td", { text: whole(round.round) }),
      make("td", { text: reason, title: why, kind: "text" }),
      make("td", { text: `${round.accepted}${extra ? ` + ${extra}` : ""}` }),
      make("td", { text: round.seconds.toFixed(1) }),
      make("td", { text: loss === undefined ? "–" : loss.toFixed(3) }),
      make("td", { text: round.state_root.slice(0, 16), title: round.state_root, kind: "text root" }),
      make("td", { text: compact(round.tokens) }),
      make("td", { text: size(round.packet_bytes) }),
      make("td", { text: size(round.download_bytes) }));
  });
  byId("rounds").tBodies[0].replaceChildren(...rows);
}

function showPeers() {
  const rows = state.peers.map((peer) => make("tr", {},
    make("td", { text: short(peer.key), title: peer.key, kind: "text root" }),
    ...[peer.accepted, peer.late, peer.refused].map((count) => make("td", { text: whole(count) })),
    make("td", { text: compact(peer.tokens) }),
    make("td", { text: whole(peer.last_round) })));
  byId("peer-table").tBodies[0].replaceChildren(...rows);
}

function showMap() {
  const table = byId("map");
  const room = table.parentElement.clientWidth - 110;
  const count = Math.max(5, Math.min(state.mapped.length, Math.floor(room / MAP_CELL)));
  const rounds = state.mapped.slice(-count);
  const rows = state.peers.map((peer) => {
    const marks = peer.marks.slice(-rounds.length);
    const cells = rounds.map((round, place) => {
      const verdict = MARKS[marks[place]];
      const code = peer.codes[round];
      return make("td", { title: `round ${round}: ${verdict === "absent" ? "no packet" : verdict}${code ? ` (SL${code})` : ""}` }, make("i", { kind: `mark ${verdict}` }));
    });
    return make("tr", {}, make("th", { text: short(peer.key), title: peer.key, kind: "root" }), ...cells);
  });
  const numbers = [];
  for (let place = 0; place < rounds.length; place += 5) {
    const cell = make("td", { text: whole(rounds[place]), kind: "number" });
    cell.colSpan = Math.min(5, rounds.length - place);
    numbers.push(cell);
  }
  if (rounds.length) rows.push(make("tr", {}, make("th", { text: "round", kind: "quiet" }), ...numbers));
  table.tBodies[0].replaceChildren(...rows);
}

// What the server says

function hear(told) {
  if (told.fresh) {
    state.rounds.clear();
    state.losses.clear();
  }
  state.now = told.now;
  state.heard = performance.now();
  if (told.run) state.run = told.run;
  for (const [round, loss] of told.losses || []) state.losses.set(round, loss);
  if (told.now.newest) state.losses.set(told.now.newest.round, told.now.newest.loss);
  for (const round of told.rounds || []) state.rounds.set(round.round, round);
  for (const round of state.rounds.keys()) if (state.rounds.size > ROUNDS_KEPT) state.rounds.delete(round);
  if (told.run) showRun();
  showNow();
  if (told.rounds) {
    state.peers = told.peers;
    state.mapped = told.mapped;
    showPeers();
    showMap();
  }
  showRounds();
  drawCharts();
  const held = told.now.paused && !told.now.complete;
  link(told.now.complete ? "complete" : held ? "held" : told.now.leading ? "live" : "live copy", held ? "held" : "good");
}

function link(text, kind) {
  say("link", text);
  byId("link").className = `pill ${kind}`;
}

// A browser connects again by itself, except when a server refuses for the moment.
function listen() {
  const events = new EventSource("events");
  events.onmessage = (event) => hear(JSON.parse(event.data));
  events.onerror = () => {
    link("connection lost, trying again", "bad");
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 5000);
  };
}

drawLegends();
listen();
setInterval(tick, 1000);
new ResizeObserver(showMap).observe(byId("map").parentElement);
