// The table of prompts. Every text comes from JSON and goes into the page as text, never as HTML.
{
  const DataTable = library.default;
  const json = (id) => JSON.parse(document.getElementById(id).textContent);
  const { changes, limits } = json("of-page");
  const kinds = Object.keys(changes);
  const percent = (rate) => `${Math.round(100 * rate)}%`;
  const count = (number) => number.toLocaleString("en");
  const shown = (number, digits) => (number === null ? "" : number.toFixed(digits));

  /** An element with a class, and texts or elements in it. */
  function make(name, className, ...children) {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.append(...children);
    return element;
  }

  /** The rows of a run: passes are [pass, rollouts, correct, tokens, difficulty, temperature]. */
  function rowsOf(run) {
    const { id, text, change, passes } = run.rows;
    return id.map((number, index) => {
      const first = passes[index][0];
      const last = passes[index].at(-1);
      const difference = last[2] / last[1] - first[2] / first[1];
      return { id: number, text: text[index], change: change[index], passes: passes[index], first, last, difference };
    });
  }

  /** A bar for each pass, as high as the part of its rollouts that were right. */
  function bars(passes) {
    const all = make("span", "bars");
    for (const [pass, rollouts, correct] of passes) {
      const bar = make("i");
      bar.style.height = `${Math.max(6, (100 * correct) / rollouts)}%`;
      bar.className = correct ? "right" : "wrong";
      bar.title = `pass ${pass}: ${correct} of ${rollouts}`;
      all.append(bar);
    }
    return all;
  }

  // What is searched DataTables takes for HTML if there is an & in it.
  const escaped = (value) => String(value).replaceAll("&", "&amp;").replaceAll("<", "&lt;");

  /** A column whose cells are made when they are seen, and sorted by a number. */
  const column = (title, value, display, more) => ({
    title,
    data: null,
    searchable: false,
    render(data, type, row) {
      if (type === "display") return display(row);
      return type === "filter" ? escaped(value(row)) : value(row);
    },
    ...more,
  });
  const rate = (pass) => pass[2] / pass[1];
  const counted = (pass) => make("span", "", `${pass[2]}/${pass[1]}`);
  const columns = [
    column("", () => 0, () => opener(), { orderable: false, className: "open" }),
    column("id", (row) => row.id, (row) => make("span", "", String(row.id)), { searchable: true, type: "num" }),
    column("prompt", (row) => row.text, (row) => make("div", "line", row.text.trim() || `prompt ${row.id}`), {
      searchable: true,
      className: "prompt",
      type: "string",
    }),
    column(
      "what became of it",
      (row) => 10 * kinds.indexOf(row.change) - Math.abs(row.difference),
      (row) => make("span", `badge ${row.change}`, changes[row.change][0]),
      { type: "num", className: "became" },
    ),
    column("first pass", (row) => rate(row.first), (row) => counted(row.first), { type: "num" }),
    column("last pass", (row) => rate(row.last), (row) => counted(row.last), { type: "num" }),
    column("change", (row) => row.difference, (row) => make("span", "", signed(row.difference)), { type: "num" }),
    column("right, by pass", () => 0, (row) => bars(row.passes), { orderable: false }),
    column("difficulty", (row) => row.last[4] ?? -1, (row) => make("span", "", shown(row.last[4], 2)), { type: "num" }),
    column("temperature", (row) => row.last[5] ?? -1, (row) => make("span", "", shown(row.last[5], 2)), { type: "num" }),
  ];

  function signed(difference) {
    const rounded = Math.round(100 * difference);
    return `${rounded > 0 ? "+" : rounded < 0 ? "−" : ""}${Math.abs(rounded)}%`;
  }

  function opener() {
    const button = make("button", "opener", "›");
    button.setAttribute("aria-label", "open the prompt");
    button.setAttribute("aria-expanded", "false");
    return button;
  }

  const parsed = {};
  /** Completions are parsed when the first prompt of their run is opened. */
  function completionsOf(run, id) {
    parsed[run] ??= json(`completions-${run}`);
    return parsed[run][id] ?? [];
  }

  function details(row, run, rewards) {
    const header = ["pass", "rollouts", "right", "", "tokens of each", "difficulty", "temperature"];
    const lines = row.passes.map((pass) => {
      const [number, rollouts, correct, tokens, difficulty, temperature] = pass;
      const cells = [number, rollouts, correct, percent(rate(pass)), Math.round(tokens / rollouts)];
      cells.push(shown(difficulty, 2), shown(temperature, 2));
      return make("tr", "", ...cells.map((cell) => make("td", "", String(cell))));
    });
    const head = make("thead", "", make("tr", "", ...header.map((name) => make("th", "", name))));
    const table = make("table", "plain numbers", head, make("tbody", "", ...lines));
    const all = make("div", "details");
    if (row.text) all.append(make("h4", "", "Prompt"), make("pre", "", row.text));
    all.append(make("h4", "", "By pass"), table);
    const passes = completionsOf(run, row.id);
    if (passes.length) {
      const beside = passes.map(([number, logged, completions]) => {
        const some = completions.length < logged ? `${completions.length} of ${logged}` : `${logged}`;
        const pass = make("section", "", make("h5", "", `Pass ${number}`), make("p", "quiet", `${some} completions`));
        for (const [values, text] of completions) pass.append(completion(values, text, rewards));
        return pass;
      });
      all.append(make("h4", "", "Completions"), make("div", "beside", ...beside));
    } else {
      all.append(make("p", "quiet", "None of its completions are on this page."));
    }
    return all;
  }

  function completion(values, text, rewards) {
    const right = values.length > 0 && values[0] !== null && values[0] > 0.5;
    const said = values.map((value, index) => `${rewards[index]} ${value ?? "none"}`).join(", ");
    const verdict = make("div", "verdict", right ? "✓ right" : "✗ wrong");
    verdict.title = said;
    if (values.length > 1) verdict.append(make("small", "", said));
    return make("div", `completion ${right ? "right" : "wrong"}`, verdict, make("pre", "", text));
  }

  function limitsSaid(run) {
    const said = [];
    if (run.num_prompts > run.rows.id.length) {
      const rows = count(run.rows.id.length);
      said.push(`The table has the ${rows} of ${count(run.num_prompts)} prompts that changed most.`);
    }
    if (run.rows.passes.some((passes) => passes.length === limits.all_passes)) {
      said.push(`Of more than ${limits.all_passes} passes it shows so many.`);
    }
    const [read, files] = run.files;
    if (files === 0) {
      said.push("No completions were logged (log_completions: true).");
    } else if (run.with_completions === 0) {
      said.push("The logged completions do not say which prompts they are of: an earlier version wrote them.");
    } else {
      const { passes, completions, characters } = limits;
      said.push(
        `Completions of ${count(run.with_completions)} prompts are on the page, of up to ${passes} passes each, ` +
          `up to ${completions} of a pass, and the first and last ${characters / 2} characters of longer ones.`,
      );
      if (read < files) said.push(`${count(read)} of ${count(files)} files of completions were read.`);
    }
    return said.join(" ");
  }

  if (document.getElementById("table")) {
    const runs = [...document.querySelectorAll("#run option")].map((option) => json(`rows-${option.value}`));
    const select = document.getElementById("run");
    let kind = null;
    const table = new DataTable("#table", {
      data: [],
      columns,
      deferRender: true,
      autoWidth: false,
      order: [[3, "asc"]],
      pageLength: 25,
      lengthMenu: [10, 25, 50, 100],
      layout: { topStart: "search", topEnd: "info", bottomStart: "pageLength", bottomEnd: "paging" },
      language: {
        search: "",
        searchPlaceholder: "search prompts",
        info: "_START_ to _END_ of _TOTAL_ prompts",
        infoEmpty: "no prompts",
        infoFiltered: "(of _MAX_)",
        lengthMenu: "_MENU_ a page",
        emptyTable: "no prompts",
        zeroRecords: "no prompt is like that",
      },
    });
    table.search.fixed("change", (text, row) => kind === null || row.change === kind);

    function chips(run) {
      const made = [[null, "all", run.rows.id.length]];
      for (const name of kinds) if (run.counts[name]) made.push([name, changes[name][0], run.counts[name]]);
      const buttons = made.map(([name, label, number]) => {
        const button = make("button", `chip ${name ?? ""}`, label, make("b", "", count(number)));
        button.setAttribute("aria-pressed", String(name === kind));
        if (name) button.title = changes[name][1];
        button.addEventListener("click", () => {
          kind = name;
          chips(run);
          table.draw();
        });
        return button;
      });
      document.getElementById("changes").replaceChildren(...buttons);
    }

    function show(chosen = null) {
      const run = runs[select.selectedIndex];
      kind = chosen;
      chips(run);
      document.getElementById("limits").textContent = limitsSaid(run);
      table.clear().rows.add(rowsOf(run)).draw();
    }

    table.on("click", "tbody tr", (event) => {
      const line = event.target.closest("tr");
      const row = table.row(line);
      if (!row.data() || window.getSelection().toString()) return;
      const opens = !row.child.isShown();
      if (opens) row.child(details(row.data(), select.value, runs[select.selectedIndex].rewards), "opened").show();
      else row.child.hide();
      line.classList.toggle("is-open", opens);
      line.querySelector(".opener").setAttribute("aria-expanded", String(opens));
    });
    for (const tile of document.querySelectorAll("[data-kind]")) {
      tile.addEventListener("click", () => {
        select.selectedIndex = Number(tile.dataset.run);
        show(Number(tile.querySelector("b").textContent.replaceAll(",", "")) ? tile.dataset.kind : null);
      });
    }
    select.addEventListener("change", () => show());
    show();
  }
}
