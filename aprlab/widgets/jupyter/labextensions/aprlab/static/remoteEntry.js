// Opens .gguf, .apr and .safetensors files in JupyterLab by double-click. Written by hand, without a bundler: this file is
// what JupyterLab expects of a federated extension, a container with `init` and `get`, and the source at once.
// The server reads ranges of the file (aprlab/widgets/file_server.py); pages that it sends have every name escaped, and
// everything else from a file goes into the page as text.
(function () {
  "use strict";

  const SUFFIXES = [".gguf", ".apr", ".safetensors"];
  const CARDS = [
    { kind: "two", label: "Two files", caption: "The original and the one that talks nonsense: what broke?" },
    { kind: "one", label: "One file", caption: "Only the broken file: what is wrong with it?" },
    { kind: "garbage", label: "Garbage", caption: "Only a sentence of garbage: which bug says it?" },
  ];
  const ONION =
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><g class="jp-icon3" fill="none" stroke="#616161" stroke-width="1.6">' +
    '<path d="M12 3c-1 4-8 5-8 11a8 7 0 0 0 16 0c0-6-7-7-8-11z"/><path d="M12 8c-1 2-4 3-4 6.500a4 3.500 0 0 0 8 0c0-3.500-3-4.500-4-6.500z"/>' +
    '<path d="M10 21l-1 2M14 21l1 2M12 21v2"/></g></svg>';
  let scope;

  async function shared(name) {
    const versions = scope[name];
    if (!versions) {
      throw new Error(`aprlab: this JupyterLab shares no ${name}`);
    }
    const all = Object.values(versions);
    const chosen = all.find((version) => version.loaded) || all[0];
    return (await chosen.get())();
  }

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) {
        made.addEventListener(name.slice(2), value);
      } else {
        made.setAttribute(name, value);
      }
    }
    made.append(...children);
    return made;
  }

  // A page of the server: its buttons do nothing here, and are none.
  function fragment(html) {
    const box = element("div", { class: "aprlab-clickable" });
    box.innerHTML = html;
    box.querySelectorAll("[data-key]").forEach((button) => button.removeAttribute("data-key"));
    return box;
  }

  function bytes(count) {
    const units = ["B", "KiB", "MiB", "GiB"];
    let power = 0;
    while (count >= 1024 && power < 3) {
      count /= 1024;
      power += 1;
    }
    return `${power ? count.toFixed(1) : count} ${units[power]}`;
  }

  function extension(modules) {
    const { ServerConnection } = modules.services;
    const { Widget } = modules.widgets;
    const { DocumentWidget, ABCWidgetFactory, DocumentModel } = modules.docregistry;
    const settings = ServerConnection.makeSettings();
    const icon = new modules.icons.LabIcon({ name: "aprlab:onion", svgstr: ONION });

    async function ask(what, given, body) {
      const query = new URLSearchParams(Object.entries(given || {}).filter(([, value]) => value !== ""));
      const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
      const response = await ServerConnection.makeRequest(`${settings.baseUrl}aprlab/${what}?${query}`, options, settings);
      if (response.status === 404 && !response.headers.get("content-type")?.includes("json")) {
        throw new Error("this server has no part of aprlab: start it by `aprlab lab`, or install aprlab beside it");
      }
      const answer = await response.json().catch(() => ({}));
      if (!response.ok) {
        throw new Error(answer.message || answer.reason || `the server answers ${response.status}`);
      }
      return answer;
    }

    // The tab of one model file.
    class FileTab extends Widget {
      constructor(context, commands) {
        super();
        this.context = context;
        this.commands = commands;
        this.addClass("aprlab-file");
        this.node.style.cssText = "overflow:auto;padding:12px;color:var(--jp-ui-font-color1);background:var(--jp-layout-color1)";
        this.sorted = { column: "", down: false };
        this.chosen = "";
        this.other = "";
        this.load();
      }

      get path() {
        return this.context.localPath || this.context.path;
      }

      async load() {
        this.say("reading the header…");
        try {
          this.file = await ask("file", { path: this.path, other: this.other });
          this.draw();
        } catch (error) {
          this.say(error.message, true);
        }
      }

      say(words, bad) {
        const colour = bad ? "var(--jp-error-color1,#b3400a)" : "inherit";
        this.node.replaceChildren(element("div", { class: "aprlab-words", role: "status", style: `color:${colour}` }, words));
      }

      draw() {
        const filter = element("input", { type: "search", placeholder: "part of a name, e.g. attn bias", "aria-label": "filter" });
        filter.addEventListener("input", () => this.rows(filter.value));
        const beside = element("input", { type: "text", placeholder: "path of another file", "aria-label": "other file" });
        beside.value = this.other;
        const compare = () => {
          this.other = beside.value.trim();
          this.load();
        };
        const button = (label, press) => element("button", { class: "jp-mod-styled", onclick: press }, label);
        const notebook = (kind) => () => this.commands.execute("aprlab:notebook", { kind, candidate: this.path, reference: this.other });
        this.table = element("div", { class: "aprlab-clickable aprlab-tensors" });
        this.detail = element("div", { class: "aprlab-detail", "aria-live": "polite" });
        this.node.replaceChildren(
          element("style", {}, this.file.style),
          fragment(this.file.head),
          element(
            "div", { style: "display:flex;flex-wrap:wrap;gap:8px;margin:8px 0" }, filter, beside,
            button("compare with it", compare), button("open as notebook", notebook(this.other ? "two" : "one"))
          ),
          this.table,
          this.detail
        );
        this.rows("");
      }

      rows(text) {
        const words = text.toLowerCase().split(/\s+/).filter(Boolean);
        const columns = this.file.compared ? ["name", "status", "type", "other", "shape", "bytes"] : ["name", "type", "shape", "bytes"];
        const shown = this.file.rows.filter((row) => words.every((word) => row.name.toLowerCase().includes(word)));
        const { column, down } = this.sorted;
        if (column) {
          shown.sort((a, b) => (a[column] < b[column] ? -1 : a[column] > b[column] ? 1 : 0) * (down ? -1 : 1));
        } else if (this.file.compared) {
          shown.sort((a, b) => (a.status === "same") - (b.status === "same"));
        }
        const sort = (name) => () => {
          this.sorted = { column: name, down: column === name && !down };
          this.rows(text);
        };
        const keys = (press) => (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), press());
        const head = columns.map((name) => {
          const arrow = name === column ? (down ? " ▼" : " ▲") : "";
          return element("th", { "data-key": name, tabindex: "0", onclick: sort(name), onkeydown: keys(sort(name)) }, name + arrow);
        });
        const body = shown.map((row) => {
          const open = () => this.open(row.name);
          const cells = columns.map((name) => {
            const bad = name === "status" && row.status !== "same" ? "color:#b3400a" : "";
            return element("td", { style: bad }, name === "bytes" ? bytes(row.bytes) : String(row[name]));
          });
          const current = row.name === this.chosen ? "aprlab-current" : "";
          return element("tr", { "data-key": row.name, class: current, tabindex: "0", onclick: open, onkeydown: keys(open) }, ...cells);
        });
        const nothing = element("tr", {}, element("td", { colspan: String(columns.length) }, "no tensor matches"));
        const grid = element(
          "table", { style: "width:100%" }, element("thead", {}, element("tr", {}, ...head)),
          element("tbody", {}, ...(body.length ? body : [nothing]))
        );
        this.table.replaceChildren(element("div", { class: "scroll", style: "max-height:24em" }, grid));
      }

      async open(name) {
        this.chosen = name;
        this.table.querySelectorAll("tbody tr").forEach((row) => row.classList.toggle("aprlab-current", row.dataset.key === name));
        this.detail.replaceChildren(`decoding ${name}…`);
        try {
          const seen = await ask("tensor", { path: this.path, name, other: this.other });
          if (this.chosen !== name) {
            return;
          }
          const picture = seen.histogram
            ? [element("img", { src: `data:image/png;base64,${seen.histogram}`, alt: `histogram of the values of ${name}` })]
            : [];
          this.block = element("div", {});
          this.detail.replaceChildren(
            element("div", { style: "display:flex;flex-wrap:wrap;gap:16px" }, fragment(seen.detail), ...picture), this.block
          );
          await this.microscope(name, 0, 0);
        } catch (error) {
          this.detail.replaceChildren(error.message);
        }
      }

      async microscope(name, row, block) {
        const seen = await ask("block", { path: this.path, name, row, block });
        if (this.chosen !== name) {
          return;
        }
        const number = (label, value, most, go) => {
          const input = element("input", { type: "number", min: "0", max: String(most), value: String(value), style: "width:7em" });
          input.addEventListener("change", () => go(Number(input.value) || 0));
          return element("label", {}, `${label} `, input, ` of 0 to ${most} `);
        };
        const go = (newRow, newBlock) =>
          this.microscope(name, newRow, newBlock).catch((error) => this.block.replaceChildren(error.message));
        this.block.replaceChildren(
          element(
            "div", { style: "margin:8px 0" }, number("row", seen.row, seen.rows - 1, (n) => go(n, seen.block)),
            number("block", seen.block, seen.blocks - 1, (n) => go(seen.row, n))
          ),
          fragment(seen.page)
        );
      }
    }

    class TabFactory extends ABCWidgetFactory {
      constructor(options, commands) {
        super(options);
        this.commands = commands;
      }

      createNewWidget(context) {
        // JupyterLab copies every file that it opens into .ipynb_checkpoints: not gigabytes that nobody can edit here.
        context.createCheckpoint = async () => ({ id: "", last_modified: "" });
        return new DocumentWidget({ context, content: new FileTab(context, this.commands) });
      }
    }

    // A model without content: JupyterLab must not fetch gigabytes to open a tab (fileFormat null asks for none).
    const models = {
      name: "aprlab-file", contentType: "file", fileFormat: null, collaborative: false, isDisposed: false,
      dispose() {}, preferredLanguage: () => "", createNew: (options) => new DocumentModel(options),
    };

    return {
      id: "aprlab:files",
      autoStart: true,
      optional: [modules.launcher.ILauncher, modules.apputils.ICommandPalette],
      activate(app, launcher, palette) {
        app.docRegistry.addFileType({
          name: "aprlab-model", displayName: "Quantised model", extensions: SUFFIXES, mimeTypes: ["application/octet-stream"],
          contentType: "file", fileFormat: "base64", icon,
        });
        app.docRegistry.addModelFactory(models);
        app.docRegistry.addWidgetFactory(
          new TabFactory(
            { name: "aprlab", label: "Model (aprlab)", modelName: "aprlab-file", fileTypes: ["aprlab-model"],
              defaultFor: ["aprlab-model"], readOnly: true },
            app.commands
          )
        );
        app.commands.addCommand("aprlab:notebook", {
          icon,
          label: (given) => given.label || "New aprlab notebook",
          caption: (given) => given.caption || "",
          execute: async (given) => {
            const path = given.candidate || given.reference || "";
            const where = path ? path.split("/").slice(0, -1).join("/") : given.cwd || "";
            const body = { kind: given.kind || "one", folder: where, candidate: given.candidate || "", reference: given.reference || "" };
            try {
              const made = await ask("notebook", {}, body);
              return await app.commands.execute("docmanager:open", { path: made.path });
            } catch (error) {
              await modules.apputils.showErrorMessage("aprlab", error.message);
            }
          },
        });
        CARDS.forEach(({ kind, label, caption }, rank) => {
          const args = { kind, label, caption };
          launcher?.add({ command: "aprlab:notebook", category: "What broke my conversion?", rank, args });
          palette?.addItem({ command: "aprlab:notebook", category: "aprlab", args });
        });
      },
    };
  }

  // Another file of this folder.
  const folder = document.currentScript.src.replace(/[^/]*$/, "");

  function script(name) {
    return new Promise((resolve, reject) => {
      const failed = () => reject(new Error(`aprlab: ${name} cannot be loaded`));
      document.head.append(element("script", { src: folder + name, onload: resolve, onerror: failed }));
    });
  }

  // Figures of aprlab in a notebook: the picture of the cell, and its data for hover and zoom. Data alone, so it is safe.
  function figures({ Widget }) {
    const kind = "application/vnd.aprlab.figure+json";

    class Figure extends Widget {
      renderModel(model) {
        const size = model.metadata["image/png"] || {};
        const words = String(model.data["text/plain"] || "");
        const titles = [...words.matchAll(/^ {2}\d+\. (['"])(.+?)\1/gm)].map((match) => match[2]);
        const picture = element("img", {
          src: `data:image/png;base64,${model.data["image/png"] || ""}`, alt: `Figure: ${titles.join("; ") || "without a title"}.`,
          style: "max-width:100%;height:auto;display:block",
        });
        for (const side of ["width", "height"]) {
          if (Number.isInteger(size[side])) {
            picture.setAttribute(side, String(size[side]));
          }
        }
        window.aprlabLive.show(this.node, picture, model.data[kind]);
        this.node.style.overflow = "auto";
        return Promise.resolve();
      }
    }

    const rendererFactory = { safe: true, mimeTypes: [kind], createRenderer: () => new Figure() };
    return { id: "aprlab:figures", rendererFactory, rank: 10, dataType: "json" };
  }

  window._JUPYTERLAB = window._JUPYTERLAB || {};
  window._JUPYTERLAB.aprlab = {
    init(given) {
      scope = given;
    },
    async get(module) {
      if (module === "./figures") {
        const [widgets] = await Promise.all([shared("@lumino/widgets"), script("live.js")]);
        const renderer = figures(widgets);
        return () => ({ __esModule: true, default: renderer });
      }
      if (module !== "./extension") {
        throw new Error(`aprlab has no module ${module}`);
      }
      const [services, widgets, docregistry, launcher, apputils, icons] = await Promise.all(
        [
          "@jupyterlab/services", "@lumino/widgets", "@jupyterlab/docregistry", "@jupyterlab/launcher", "@jupyterlab/apputils",
          "@jupyterlab/ui-components",
        ].map(shared)
      );
      const plugin = extension({ services, widgets, docregistry, launcher, apputils, icons });
      return () => ({ __esModule: true, default: plugin });
    },
  };
})();
