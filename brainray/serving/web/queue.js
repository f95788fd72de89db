// A queue that runs a few items at a time, and can be paused.

/** Runs the added items in order, at most `parallel` at a time. */
export class Queue {
  #run;
  #parallel;
  #waiting = [];
  #running = 0;
  #resumeAt = 0;
  #isLocked = false;

  /** @param {(item: object) => Promise<void>} run handles its own failures. */
  constructor(run, parallel) {
    this.#run = run;
    this.#parallel = parallel;
  }

  add(items) {
    this.#waiting.push(...items);
    this.#start();
  }

  /** Put an item back, before all that wait. */
  addFirst(item) {
    this.#waiting.unshift(item);
    this.#start();
  }

  /** Start nothing for some time. */
  pause(seconds) {
    this.#resumeAt = Math.max(this.#resumeAt, Date.now() + 1000 * seconds);
    setTimeout(() => this.#start(), 1000 * seconds + 10);
  }

  /** Start nothing until unlocked. */
  lock() {
    this.#isLocked = true;
  }

  unlock() {
    this.#isLocked = false;
    this.#start();
  }

  /** Drop the waiting items. */
  clear() {
    this.#waiting = [];
  }

  #start() {
    while (!this.#isLocked && Date.now() >= this.#resumeAt && this.#running < this.#parallel
      && this.#waiting.length) {
      this.#running += 1;
      this.#run(this.#waiting.shift()).finally(() => {
        this.#running -= 1;
        this.#start();
      });
    }
  }
}
