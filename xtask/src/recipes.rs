//! How each module is built, as `recipes.toml` says: which sources, rendered from which templates, with which flags.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value};
use serde::Deserialize;

use crate::provision::JIT_CACHE;
use crate::shell;
use crate::uri::Uri;
use crate::vendoring::digest::{Hasher, hash};
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::lock::Lock;
use crate::vendoring::modules;
use crate::vendoring::store::publish_bytes;

const RECIPES: &str = include_str!("../recipes.toml");

/// The modules that each Cargo feature vendors, as artifacts.lock says.
fn vendored() -> Result<BTreeMap<String, Vec<String>>> {
    let lock = Lock::read(&shell::root().join("artifacts.lock"))?;
    let mut features = BTreeMap::<_, Vec<String>>::new();
    for wheel in lock.for_target(&shell::target()).filter(|wheel| wheel.distribution == JIT_CACHE) {
        for member in &wheel.members {
            if let (Some(feature), Some(name)) = (&member.feature, modules::name(&member.path)) {
                features.entry(feature.clone()).or_default().push(name.to_owned());
            }
        }
    }
    Ok(features)
}

/// The families whose kernels this crate calls, but attention, which has a module for each combination of types and sizes:
/// all of them take hours.
pub fn usual() -> Result<Vec<String>> {
    families(false)
}

/// The families of attention.
pub fn attention() -> Result<Vec<String>> {
    families(true)
}

fn families(of_attention: bool) -> Result<Vec<String>> {
    let is_attention = |modules: &[String]| modules.iter().any(|module| module.parse::<Uri>().is_ok());
    let families = vendored()?.into_iter().filter(|(_, modules)| is_attention(modules) == of_attention);
    Ok(families.map(|(name, _)| name).collect())
}

/// What takes half an hour to build on two cores, and is left to whoever asks for it.
pub const SLOW: &str = "gdn-prefill";

/// The module of attention that the tests are run with: it is the smallest that plans, and tests on the host compare with
/// what it plans.
const PLANNER: &str = "batch-decode";

/// What the tests are run with, where nothing else is at hand: all families but the slow ones, and of attention the
/// [planner](PLANNER).
pub fn quick() -> Result<Vec<String>> {
    let families = usual()?.into_iter().filter(|family| family != SLOW);
    Ok(families.chain([PLANNER.to_owned()]).collect())
}

/// Where FlashInfer's sources lie in the tree, and those that are compiled.
const PACKAGE: &str = "flashinfer";
const SOURCES: &str = "flashinfer/csrc";
/// Where generated files go in the tree, a folder for each module and each content.
pub const GENERATED: &str = "gen";

type Variables = BTreeMap<String, Value>;
type Choices = Vec<BTreeMap<String, Scalar>>;

/// All recipes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipes {
    /// Names for groups of modules, beside Cargo features.
    families: BTreeMap<String, Vec<String>>,
    spellings: BTreeMap<String, BTreeMap<String, String>>,
    #[serde(default)]
    choices: BTreeMap<String, Choices>,
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
    each: Vec<Each>,
}

/// A list, or the name of one in `choices`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Each {
    Named(String),
    List(Choices),
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
        let mut recipes = Self::parse(RECIPES)?;
        for (feature, modules) in vendored()? {
            if recipes.families.insert(feature.clone(), modules).is_some() {
                refuse!("xtask/recipes.toml has the family {feature}, which is a Cargo feature's name; rename it");
            }
        }
        Ok(recipes)
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

    /// The names of the modules that [`select`](Self::select) answers.
    pub fn names(&self, names: &[String]) -> Result<Vec<String>> {
        Ok(self.select(names)?.into_iter().map(|module| module.name).collect())
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
        // The only pattern whose parameters depend on each other, and nothing else would notice.
        if name.parse().is_ok_and(|uri| matches!(uri, Uri::Xqa(_)) && !uri.is_released()) {
            refuse!(
                "`{name}` cannot be built: XQA has one type for queries and output, and keys and values of that type or \
                 e4m3"
            );
        }
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
    pub fn flags(&self, asked: &[String]) -> Result<Vec<String>> {
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
        let renderer = Renderer::new(&self.name)?;
        for flag in &recipe.flags {
            flags.push(renderer.render(flag, &self.variables, flag)?);
        }
        Ok(flags)
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
        let renderer = Renderer::new(&self.name)?;
        let mut variables = self.variables.clone();
        for (name, variable) in &self.recipe.variables {
            let value = match variable {
                Variable::Text(text) => Value::from(renderer.render(text, &self.variables, name)?),
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
                variables.insert(name.clone(), Value::from(renderer.render(text, &own, name)?));
            }
        }
        let mut all = Vec::new();
        for generate in &self.recipe.generate {
            let template = match &generate.template {
                Template::File(file) => text(&tree.join(SOURCES).join(file))?,
                Template::Constant(constant) => constant.read(tree)?,
            };
            let mut each = Vec::new();
            for choices in &generate.each {
                each.push(match choices {
                    Each::List(choices) => choices,
                    Each::Named(name) => match recipes.choices.get(name) {
                        Some(choices) => choices,
                        None => {
                            refuse!("xtask/recipes.toml: {} names the choices `{name}`, which are not there", self.name)
                        }
                    },
                });
            }
            for chosen in combinations(&each) {
                let mut variables = variables.clone();
                variables.extend(chosen);
                let file = renderer.render(&generate.file, &variables, &generate.file)?;
                all.push(Generated { text: renderer.render(&template, &variables, &file)?, file });
            }
        }
        for file in &self.recipe.copies {
            all.push(Generated { text: text(&tree.join(SOURCES).join(file))?, file: file.clone() });
        }
        Ok(all)
    }
}

/// Fills templates of one module in.
struct Renderer<'a> {
    engine: Environment<'static>,
    module: &'a str,
}

impl<'a> Renderer<'a> {
    fn new(module: &'a str) -> Result<Self> {
        let mut engine = Environment::new();
        // A template must not be right by accident.
        engine.set_undefined_behavior(UndefinedBehavior::Strict);
        engine.set_auto_escape_callback(|_| AutoEscape::None);
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        engine.set_syntax(syntax.map_err(|e| Error::Refused(format!("templates cannot be read: {e}")))?);
        Ok(Self { engine, module })
    }

    fn render(&self, text: &str, variables: &Variables, what: &str) -> Result<String> {
        let failed = |e: minijinja::Error| {
            Error::Refused(format!("the module {}: {what} cannot be rendered: {e:#}; correct its recipe", self.module))
        };
        self.engine.render_str(text, variables).map_err(failed)
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
fn combinations(each: &[&Choices]) -> Vec<Variables> {
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
    use crate::uri;

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
        assert_eq!(modules[0].flags(&asked).expect("flags"), own);
        let usual = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17"];
        assert_eq!(modules[1].flags(&asked).expect("flags"), usual);
        assert_eq!(modules[0].memory(), 1 << 29);
    }

    #[test]
    fn every_family_of_this_checkout_names_modules_that_have_recipes() {
        let recipes = Recipes::read().expect("recipes");
        for family in recipes.families.keys() {
            assert!(!select(&recipes, &[family]).expect(family).is_empty());
        }
        // A pattern that no name matches would never be noticed.
        let released: Vec<String> = released().iter().map(Uri::to_string).collect();
        for recipe in &recipes.recipes {
            let used = recipes.families.values().flatten().chain(&released);
            let mut used = used.filter(|name| {
                let parameters = recipes.parameters(recipe, &recipe.name, name);
                parameters.is_ok_and(|parameters| parameters.is_some())
            });
            assert!(used.next().is_some(), "{} is in no family", recipe.name);
        }
    }

    fn released() -> Vec<Uri> {
        uri::tests::candidates().into_iter().filter(Uri::is_released).collect()
    }

    #[test]
    fn every_attention_module_of_the_release_has_one_recipe() {
        let recipes = Recipes::read().expect("recipes");
        for uri in released() {
            let name = uri.to_string();
            let fitting = recipes.recipes.iter().filter(|recipe| {
                let parameters = recipes.parameters(recipe, &recipe.name, &name);
                parameters.expect("a whole recipe").is_some()
            });
            assert_eq!(fitting.count(), 1, "{name}");
            let module = recipes.module(&name).expect("a recipe").expect("a module");
            let flags = module.flags(&["8.0".to_owned(), "9.0a".to_owned()]).expect("flags");
            let hopper_alone = flags.iter().filter(|flag| flag.starts_with("-gencode=")).count() == 1;
            assert_eq!(hopper_alone, name.ends_with("_sm90") || matches!(uri, Uri::Xqa(_)), "{name}");
        }
    }

    #[test]
    fn the_sources_of_xqa_are_told_its_parameters() {
        let recipes = Recipes::read().expect("recipes");
        let flags = |name: &str| {
            let module = recipes.module(name).expect("a recipe").expect("a module");
            module.flags(&["9.0a".to_owned()]).expect("flags")
        };
        let all = flags(
            "xqa_input_f16_kv_cache_e4m3_output_f16_page_size_64_head_dim_256_head_group_ratio_8_\
             use_sliding_window_True_use_spec_dec_False_spec_q_seq_len_1",
        );
        for flag in [
            "-DINPUT_FP16=1",
            "-DDTYPE=__half",
            "-DCACHE_ELEM_ENUM=2",
            "-DTOKENS_PER_PAGE=64",
            "-DHEAD_ELEMS=256",
            "-DHEAD_GRP_SIZE=8",
            "-DSLIDING_WINDOW=1",
            "-gencode=arch=compute_90a,code=sm_90a",
        ] {
            assert!(all.iter().any(|found| found == flag), "{flag}: {all:?}");
        }
        let name = "xqa_input_bf16_kv_cache_bf16_output_bf16_page_size_16_head_dim_128_head_group_ratio_1_\
                    use_sliding_window_False_use_spec_dec_False_spec_q_seq_len_1";
        let all = flags(name);
        for flag in ["-DINPUT_FP16=0", "-DDTYPE=__nv_bfloat16", "-DCACHE_ELEM_ENUM=0", "-DSLIDING_WINDOW=0"] {
            assert!(all.iter().any(|found| found == flag), "{flag}: {all:?}");
        }
        for wrong in ["kv_cache_f16", "output_f16"] {
            let (key, _) = wrong.rsplit_once('_').expect("a key");
            let fault =
                recipes.module(&name.replace(&format!("{key}_bf16"), wrong)).err().expect("refused").to_string();
            assert!(fault.contains("one type") && fault.contains(wrong), "{fault}");
        }
    }

    #[test]
    fn the_tests_are_run_with_what_is_quickly_built() {
        let (quick, recipes) = (quick().expect("names"), Recipes::read().expect("recipes"));
        let modules = recipes.select(&quick).expect("modules");
        assert!(!names(&modules).contains(&"gdn_prefill_sm90".to_owned()));
        let attention: Vec<Uri> = names(&modules).iter().filter_map(|name| name.parse().ok()).collect();
        assert!(matches!(attention.as_slice(), [Uri::BatchDecode(_)]), "{attention:?}");
        assert!(
            attention
                .iter()
                .all(|uri| names(&recipes.select(&["attention".to_owned()]).expect("modules"))
                    .contains(&uri.to_string()))
        );
    }

    #[test]
    fn attention_has_five_families_and_none_of_them_is_usual() {
        let (usual, attention) = (usual().expect("names"), attention().expect("names"));
        assert_eq!(attention, ["attention", "attention-fp8-kv", "attention-mla", "attention-sinks", "attention-xqa"]);
        assert!(usual.iter().all(|family| !attention.contains(family)) && usual.contains(&"norm".to_owned()));
    }
}
