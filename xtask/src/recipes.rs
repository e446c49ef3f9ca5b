//! How each module is built, as `recipes.toml` says: which sources, rendered from which templates, with which flags.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value};
use serde::Deserialize;

use crate::provision::JIT_CACHE;
use crate::shell;
use crate::vendoring::digest::{Hasher, hash};
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::lock::Lock;
use crate::vendoring::store::publish_bytes;

const RECIPES: &str = include_str!("../recipes.toml");

/// The families whose kernels this crate calls: the features that artifacts.lock names for the jit-cache wheel's members.
pub fn usual() -> Result<Vec<String>> {
    let lock = Lock::read(&shell::root().join("artifacts.lock"))?;
    let target = shell::target();
    let wheels = lock.for_target(&target).filter(|wheel| wheel.distribution == JIT_CACHE);
    let features = wheels.flat_map(|wheel| wheel.members.iter().filter_map(|member| member.feature.clone()));
    Ok(features.collect::<BTreeSet<_>>().into_iter().collect())
}

/// What takes half an hour to build on two cores, and is left to whoever asks for it.
const SLOW: &str = "gdn-prefill";

/// The families that the tests are run with, where nothing else is at hand: all but the slow one.
pub fn quick() -> Result<Vec<String>> {
    Ok(usual()?.into_iter().filter(|family| family != SLOW).collect())
}

/// Where FlashInfer's sources lie in the tree, and those that are compiled.
const PACKAGE: &str = "flashinfer";
const SOURCES: &str = "flashinfer/csrc";
/// Where generated files go in the tree, a folder for each module and each content.
pub const GENERATED: &str = "gen";

type Variables = BTreeMap<String, Value>;

/// All recipes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipes {
    /// Names for groups of modules.
    families: BTreeMap<String, Vec<String>>,
    spellings: BTreeMap<String, BTreeMap<String, String>>,
    shared: BTreeMap<String, BTreeMap<String, String>>,
    #[serde(rename = "module")]
    recipes: Vec<Recipe>,
}

/// The recipe of one module, or of all those whose names differ in their parameters only.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    name: String,
    #[serde(default)]
    parameters: BTreeMap<String, String>,
    #[serde(default)]
    variables: BTreeMap<String, Variable>,
    #[serde(default)]
    shared: Vec<String>,
    #[serde(default)]
    generate: Vec<Generate>,
    #[serde(default)]
    copies: Vec<String>,
    #[serde(default)]
    sources: Vec<String>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    includes: Vec<String>,
    #[serde(default)]
    libraries: Vec<Library>,
    memory: f64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Variable {
    Text(String),
    Constant(PythonString),
    List(Vec<BTreeMap<String, String>>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Template {
    File(String),
    Constant(PythonString),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Number(i64),
    Text(String),
}

/// A string constant of a Python file: some of upstream's templates are such.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PythonString {
    python: String,
    string: String,
}

/// Files made from one template.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Generate {
    template: Template,
    file: String,
    #[serde(default)]
    each: Vec<Vec<BTreeMap<String, Scalar>>>,
}

/// A library to link with. All that the linker wants of it is its soname.
#[derive(Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Library {
    pub name: String,
    pub soname: String,
}

/// One module, to be built.
pub struct Module<'a> {
    pub name: String,
    recipe: &'a Recipe,
    variables: Variables,
}

/// A file that is compiled or included, and what it says.
struct Generated {
    file: String,
    text: String,
}

impl Recipes {
    /// Those of this checkout.
    pub fn read() -> Result<Self> {
        Self::parse(RECIPES)
    }

    fn parse(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|e| Error::Refused(format!("xtask/recipes.toml: {e}")))
    }

    /// The modules that these names of families and of modules stand for, each once, sorted by name.
    pub fn select(&self, names: &[String]) -> Result<Vec<Module<'_>>> {
        let mut modules = BTreeMap::new();
        for name in names {
            let one = std::slice::from_ref(name);
            for member in self.families.get(name).map_or(one, Vec::as_slice) {
                let Some(module) = self.module(member)? else {
                    refuse!("there is no recipe for `{name}`; {}", self.known())
                };
                modules.insert(member.clone(), module);
            }
        }
        if modules.is_empty() {
            refuse!("no kernels are named; {}", self.known());
        }
        Ok(modules.into_values().collect())
    }

    fn known(&self) -> String {
        let families: Vec<&str> = self.families.keys().map(String::as_str).collect();
        let modules: Vec<&str> = self.recipes.iter().map(|recipe| recipe.name.as_str()).collect();
        format!(
            "name families ({}) or modules ({}), or add a recipe to xtask/recipes.toml",
            families.join(", "),
            modules.join(", ")
        )
    }

    fn module(&self, name: &str) -> Result<Option<Module<'_>>> {
        for recipe in &self.recipes {
            if let Some(variables) = self.parameters(recipe, &recipe.name, name)? {
                return Ok(Some(Module { name: name.to_owned(), recipe, variables }));
            }
        }
        Ok(None)
    }

    /// The values of the parameters in a name, if it is one of the pattern's.
    fn parameters(&self, recipe: &Recipe, pattern: &str, name: &str) -> Result<Option<Variables>> {
        let Some((literal, rest)) = pattern.split_once('{') else {
            return Ok((pattern == name).then(Variables::new));
        };
        let Some(name) = name.strip_prefix(literal) else { return Ok(None) };
        let spellings = rest.split_once('}').and_then(|(parameter, rest)| {
            let spellings = self.spellings.get(recipe.parameters.get(parameter)?)?;
            Some((parameter, spellings, rest))
        });
        let Some((parameter, spellings, rest)) = spellings else {
            refuse!("xtask/recipes.toml: {} has a parameter without spellings; give it some", recipe.name)
        };
        for (spelling, value) in spellings {
            let Some(name) = name.strip_prefix(spelling.as_str()) else { continue };
            if let Some(mut variables) = self.parameters(recipe, rest, name)? {
                variables.insert(parameter.to_owned(), Value::from(value.as_str()));
                return Ok(Some(variables));
            }
        }
        Ok(None)
    }
}

impl Module<'_> {
    /// Memory that compiling one of its files takes at the peak, in bytes.
    pub fn memory(&self) -> u64 {
        (self.recipe.memory * f64::from(1 << 30)) as u64
    }

    pub fn libraries(&self) -> &[Library] {
        &self.recipe.libraries
    }

    /// The recipe's flags, after those of every module.
    pub fn flags(&self, asked: &[String]) -> Vec<String> {
        let recipe = self.recipe;
        let architectures = if recipe.architectures.is_empty() { asked } else { &recipe.architectures };
        let mut flags: Vec<String> =
            recipe.includes.iter().flat_map(|folder| ["-isystem".to_owned(), folder.clone()]).collect();
        flags.extend(architectures.iter().map(|architecture| {
            let number = architecture.replace('.', "");
            format!("-gencode=arch=compute_{number},code=sm_{number}")
        }));
        if !recipe.flags.iter().any(|flag| flag.starts_with("-std=")) {
            flags.push("-std=c++17".to_owned());
        }
        flags.extend(recipe.flags.iter().cloned());
        flags
    }

    /// What is compiled, relative to the tree, where generated files are put.
    pub fn sources(&self, recipes: &Recipes, tree: &Path) -> Result<Vec<String>> {
        let generated = self.generated(recipes, tree)?;
        let mut sources = Vec::new();
        if !generated.is_empty() {
            // Named by content, since two runs may generate other files at once, and each must compile its own.
            let mut content = Hasher::new();
            for Generated { file, text } in &generated {
                content.update(format!("{file} {}\n", hash(text.as_bytes())).as_bytes());
            }
            let folder = format!("{GENERATED}/{}-{}", self.name, &content.finish().to_string()[..16]);
            for Generated { file, text } in &generated {
                let path = tree.join(&folder).join(file);
                if fs::read(&path).ok().as_deref() != Some(text.as_bytes()) {
                    publish_bytes(&path, text.as_bytes())?;
                }
                if file.ends_with(".cu") {
                    sources.push(format!("{folder}/{file}"));
                }
            }
        }
        sources.extend(self.recipe.sources.iter().map(|source| format!("{SOURCES}/{source}")));
        Ok(sources)
    }

    fn generated(&self, recipes: &Recipes, tree: &Path) -> Result<Vec<Generated>> {
        let mut engine = Environment::new();
        // A template must not be right by accident.
        engine.set_undefined_behavior(UndefinedBehavior::Strict);
        engine.set_auto_escape_callback(|_| AutoEscape::None);
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        engine.set_syntax(syntax.map_err(|e| Error::Refused(format!("templates cannot be read: {e}")))?);
        let render = |text: &str, variables: &Variables, what: &str| {
            let failed = |e: minijinja::Error| {
                Error::Refused(format!(
                    "the module {}: {what} cannot be rendered: {e:#}; correct its recipe",
                    self.name
                ))
            };
            engine.render_str(text, variables).map_err(failed)
        };
        let mut variables = self.variables.clone();
        for (name, variable) in &self.recipe.variables {
            let value = match variable {
                Variable::Text(text) => Value::from(render(text, &self.variables, name)?),
                Variable::Constant(constant) => Value::from(constant.read(tree)?),
                Variable::List(list) => list.iter().map(Value::from).collect(),
            };
            variables.insert(name.clone(), value);
        }
        let own = variables.clone();
        for table in &self.recipe.shared {
            let Some(table) = recipes.shared.get(table) else {
                refuse!("xtask/recipes.toml: {} names the shared variables `{table}`, which are not there", self.name)
            };
            for (name, text) in table {
                variables.insert(name.clone(), Value::from(render(text, &own, name)?));
            }
        }
        let mut all = Vec::new();
        for generate in &self.recipe.generate {
            let template = match &generate.template {
                Template::File(file) => text(&tree.join(SOURCES).join(file))?,
                Template::Constant(constant) => constant.read(tree)?,
            };
            for chosen in combinations(&generate.each) {
                let mut variables = variables.clone();
                variables.extend(chosen);
                let file = render(&generate.file, &variables, &generate.file)?;
                all.push(Generated { text: render(&template, &variables, &file)?, file });
            }
        }
        for file in &self.recipe.copies {
            all.push(Generated { text: text(&tree.join(SOURCES).join(file))?, file: file.clone() });
        }
        Ok(all)
    }
}

impl From<&Scalar> for Value {
    fn from(scalar: &Scalar) -> Self {
        match scalar {
            Scalar::Number(number) => (*number).into(),
            Scalar::Text(text) => text.into(),
        }
    }
}

/// Every choice of one entry of each list; the last list varies fastest.
fn combinations(each: &[Vec<BTreeMap<String, Scalar>>]) -> Vec<Variables> {
    each.iter().fold(vec![Variables::new()], |all, choices| {
        let extended = all.iter().flat_map(|chosen| {
            choices.iter().map(move |choice| {
                let mut chosen = chosen.clone();
                chosen.extend(choice.iter().map(|(name, value)| (name.clone(), value.into())));
                chosen
            })
        });
        extended.collect()
    })
}

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| Error::io("reading", path, &e))
}

impl PythonString {
    fn read(&self, tree: &Path) -> Result<String> {
        let path = tree.join(PACKAGE).join(&self.python);
        let Some(found) = constant(&text(&path)?, &self.string) else {
            refuse!(
                "{} has no string {} in three quotation marks; correct the recipe for this release of FlashInfer",
                path.display(),
                self.string
            )
        };
        Ok(found)
    }
}

/// What stands between the quotation marks of `name = r"""…"""`.
fn constant(python: &str, name: &str) -> Option<String> {
    let start = format!("{name} = r\"\"\"");
    let at = python.match_indices(&start).find(|(at, _)| *at == 0 || python[..*at].ends_with('\n'))?.0;
    let (found, _) = python[at + start.len()..].split_once("\"\"\"")?;
    Some(found.to_owned())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const SMALL: &str = r#"
        [families]
        all = ["plain", "many"]
        [spellings]
        type = { f16 = "half", bf16 = "nv_bfloat16" }
        switch = { False = "false", True = "true" }
        [shared.more]
        greeting = "{% for n in names %}{{ n.name }};{% endfor %}{{ own }}"
        [[module]]
        name = "plain"
        sources = ["plain.cu"]
        memory = 2
        [[module]]
        name = "many"
        sources = ["last.cu"]
        flags = ["-std=c++20", "-DX"]
        architectures = ["9.0a"]
        memory = 0.5
        [[module.generate]]
        template = "many.jinja"
        file = "many_{{ n }}{{ m }}.cu"
        each = [[{ n = 0, word = "a" }, { n = 1, word = "b" }], [{ m = 0 }, { m = 1 }]]
        [[module]]
        name = "of_{dtype}_on_{on}"
        copies = ["binding.cu"]
        shared = ["more"]
        memory = 1
        parameters = { dtype = "type", on = "switch" }
        variables = { own = "<{{ on }}>", names = [{ name = "x" }, { name = "y" }], body = { python = "jit/a.py", string = "templ" } }
        [[module.generate]]
        template = { python = "jit/a.py", string = "templ" }
        file = "config.inc"
    "#;

    fn tree() -> TempDir {
        let temp = tempfile::tempdir().expect("a temporary folder");
        for (path, text) in [
            ("csrc/many.jinja", "{{ word }}{{ m }}\n"),
            ("csrc/binding.cu", "#include \"config.inc\"\n"),
            ("jit/a.py", "other_templ = r\"\"\"no\"\"\"\ntempl = r\"\"\"\n{{ dtype }} {{ greeting }}\n\"\"\"\n"),
        ] {
            publish_bytes(&temp.path().join(PACKAGE).join(path), text.as_bytes()).expect("a file");
        }
        temp
    }

    fn select<'a>(recipes: &'a Recipes, names: &[&str]) -> Result<Vec<Module<'a>>> {
        recipes.select(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
    }

    fn names(modules: &[Module<'_>]) -> Vec<String> {
        modules.iter().map(|module| module.name.clone()).collect()
    }

    #[test]
    fn families_and_modules_can_be_named_and_come_once() {
        let recipes = Recipes::parse(SMALL).expect("recipes");
        let modules = select(&recipes, &["plain", "all", "of_f16_on_True"]).expect("modules");
        assert_eq!(names(&modules), ["many", "of_f16_on_True", "plain"]);
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let recipes = Recipes::parse(SMALL).expect("recipes");
        for name in ["norn", "of_f32_on_True", "of_f16_on_True_", "plain ", ""] {
            let fault = select(&recipes, &[name]).err().expect("refused").to_string();
            for part in [&format!("`{name}`"), "all", "plain", "of_{dtype}_on_{on}", "xtask/recipes.toml"] {
                assert!(fault.contains(part), "{name}: {fault}");
            }
        }
        assert!(select(&recipes, &[]).is_err());
    }

    #[test]
    fn every_combination_is_rendered_and_the_last_list_varies_fastest() {
        let (recipes, tree) = (Recipes::parse(SMALL).expect("recipes"), tree());
        let modules = select(&recipes, &["many"]).expect("the module");
        let sources = modules[0].sources(&recipes, tree.path()).expect("sources");
        let files: Vec<&str> = sources.iter().filter_map(|path| path.rsplit('/').next()).collect();
        assert_eq!(files, ["many_00.cu", "many_01.cu", "many_10.cu", "many_11.cu", "last.cu"]);
        assert_eq!(fs::read_to_string(tree.path().join(&sources[2])).expect("a source"), "b0\n");
        assert_eq!(sources[4], "flashinfer/csrc/last.cu");
    }

    #[test]
    fn parameters_shared_variables_and_python_strings_reach_the_template() {
        let (recipes, tree) = (Recipes::parse(SMALL).expect("recipes"), tree());
        let modules = select(&recipes, &["of_bf16_on_False"]).expect("the module");
        let sources = modules[0].sources(&recipes, tree.path()).expect("sources");
        let [binding] = sources.as_slice() else { panic!("{sources:?}") };
        let config = tree.path().join(binding).with_file_name("config.inc");
        assert_eq!(fs::read_to_string(config).expect("the config"), "\nnv_bfloat16 x;y;<false>\n");
    }

    #[test]
    fn a_generated_file_that_was_changed_is_written_again() {
        let (recipes, tree) = (Recipes::parse(SMALL).expect("recipes"), tree());
        let modules = select(&recipes, &["many"]).expect("the module");
        let sources = modules[0].sources(&recipes, tree.path()).expect("sources");
        fs::write(tree.path().join(&sources[0]), "evil").expect("another text");
        assert_eq!(modules[0].sources(&recipes, tree.path()).expect("sources"), sources);
        assert_eq!(fs::read_to_string(tree.path().join(&sources[0])).expect("a source"), "a0\n");
    }

    #[test]
    fn other_content_goes_to_another_folder() {
        let (recipes, tree) = (Recipes::parse(SMALL).expect("recipes"), tree());
        let modules = select(&recipes, &["many"]).expect("the module");
        let before = modules[0].sources(&recipes, tree.path()).expect("sources");
        fs::write(tree.path().join("flashinfer/csrc/many.jinja"), "{{ word }}").expect("another template");
        let after = modules[0].sources(&recipes, tree.path()).expect("sources");
        assert!(before[..4].iter().zip(&after).all(|(before, after)| before != after));
    }

    #[test]
    fn a_variable_that_is_not_there_is_a_fault() {
        let (recipes, tree) = (Recipes::parse(SMALL).expect("recipes"), tree());
        fs::write(tree.path().join("flashinfer/csrc/many.jinja"), "{{ unknown }}").expect("another template");
        let modules = select(&recipes, &["many"]).expect("the module");
        let fault = modules[0].sources(&recipes, tree.path()).expect_err("refused").to_string();
        assert!(fault.contains("many_00.cu") && fault.contains("undefined"), "{fault}");
    }

    #[test]
    fn flags_follow_the_architectures_and_the_standard() {
        let recipes = Recipes::parse(SMALL).expect("recipes");
        let modules = select(&recipes, &["all"]).expect("modules");
        let asked = ["8.0".to_owned(), "9.0a".to_owned()];
        let own = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-DX"];
        assert_eq!(modules[0].flags(&asked), own);
        let usual = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17"];
        assert_eq!(modules[1].flags(&asked), usual);
        assert_eq!(modules[0].memory(), 1 << 29);
    }

    #[test]
    fn every_family_of_this_checkout_names_modules_that_have_recipes() {
        let recipes = Recipes::read().expect("recipes");
        for family in recipes.families.keys() {
            assert!(!select(&recipes, &[family]).expect(family).is_empty());
        }
        assert!(usual().expect("the lock").iter().all(|family| recipes.families.contains_key(family)));
        // A pattern that no name matches would never be noticed.
        for recipe in &recipes.recipes {
            let used = recipes.families.values().flatten();
            let mut used = used.filter(|name| {
                let parameters = recipes.parameters(recipe, &recipe.name, name);
                parameters.is_ok_and(|parameters| parameters.is_some())
            });
            assert!(used.next().is_some(), "{} is in no family", recipe.name);
        }
    }
}
