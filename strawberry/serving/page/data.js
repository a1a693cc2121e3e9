// Files, datasets and models: bring text, look at it, build a dataset of it; what the disk holds.

import { get } from "./api.js";
import { DATASETS_PATH, DatasetList } from "./data_datasets.js";
import { FileList } from "./data_files.js";
import { DatasetForm } from "./data_form.js";
import { ModelList } from "./data_models.js";
import { el, isActive, sayProblem } from "./dom.js";

export const title = "Data";

export function mount(root) {
  const view = new DataPage();
  root.append(view.loading, view.page);
  return view;
}

class DataPage {
  constructor() {
    const refresh = () => this.refresh();
    this.files = new FileList(refresh, () => this.form.showChosen());
    this.datasets = new DatasetList(refresh);
    this.models = new ModelList(refresh);
    this.form = new DatasetForm(
      () => this.files.chosen(),
      dataset => this.showNew(dataset)
    );
    this.loading = el("p", { class: "loading" }, "Loading the data …");
    this.page = el(
      "div",
      {},
      el("div", { class: "columns" }, this.files.element, this.form.element),
      this.datasets.element,
      this.models.element
    );
    this.page.hidden = true;
  }

  async refresh() {
    const [files, datasets, models, use] = await this.load();
    this.loading.hidden = true;
    this.page.hidden = false;
    this.files.show(files.data);
    this.datasets.show(datasets.data);
    this.datasets.showDisk(use);
    this.models.show(models.data);
    this.form.offerEncoders(datasets.data, models.data);
    this.form.showChosen();
    return datasets.data.some(dataset => isActive(dataset.status));
  }

  async load() {
    const paths = ["/v1/files?limit=1000", DATASETS_PATH, "/v1/models", "/v1/disk"];
    try {
      return await Promise.all(paths.map(path => get(path)));
    } catch (problem) {
      if (this.page.hidden) sayProblem(this.loading, problem);
      throw problem;
    }
  }

  async showNew(dataset) {
    await this.refresh();
    this.datasets.focus(dataset.id);
  }
}
